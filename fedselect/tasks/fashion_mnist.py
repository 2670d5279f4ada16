"""Fashion-MNIST (Zalando, MIT) from Debian's package: 10 sites with 5 classes each, scarce.

Owns reading the IDX files and this one task. Downloads nothing: the files come with
``apt-get install dataset-fashion-mnist``, or from any folder that holds the same four files.
"""

from __future__ import annotations

import gzip
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from fedselect.errors import FedSelectError
from fedselect.tasks.arrays import ArrayTask, IntVector, LabelSkew, mlp

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts them
HELD_OUT = 50  # per class and site, of the data set's own test part
_FILES = (
    ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
)

Images = npt.NDArray[np.uint8]


class FashionMnistTask(ArrayTask):
    """One of ``clients`` sites with ``classes`` classes, ``per_class`` training images of each.

    MLP 784-64-32-10 (52,650 parameters). ``seed`` draws the split and the starting weights; all
    arguments but ``client`` must be the same at all sites.

    Raises:
        FedSelectError: no such client, the files are missing or damaged, or too few images.
    """

    def __init__(
        self,
        client: int,
        *,
        clients: int = 10,
        classes: int = 5,
        per_class: int = 10,
        seed: int = 0,
        folder: str | Path = FOLDER,
    ) -> None:
        if client not in range(clients):
            raise FedSelectError(f"client must be 0 to {clients - 1}, got {client!r}")
        split = LabelSkew(clients, classes, seed=seed)
        parts = []
        for (images, labels), count in zip(load(Path(folder)), (per_class, HELD_OUT), strict=True):
            rows = split.rows(labels, count)[client].reshape(-1)
            parts.append((images[rows] / np.float32(255), labels[rows]))
        super().__init__(parts[0], parts[1], seed=seed)

    def network(self) -> nn.Module:
        """MLP 784-64-32-10."""
        return mlp(28 * 28, 10)


@lru_cache(maxsize=1)  # a simulation builds every site from the same 55 MB
def load(folder: Path) -> tuple[tuple[Images, IntVector], tuple[Images, IntVector]]:
    """Images (n, 28, 28) and labels (n,) of the training part and of the test part.

    Raises:
        FedSelectError: the files are missing or damaged.
    """
    missing = [name for pair in _FILES for name in pair if not (folder / name).is_file()]
    if missing:
        raise FedSelectError(
            f"{folder} has no {', '.join(missing)}; on Debian and Ubuntu: "
            "apt-get install dataset-fashion-mnist; elsewhere put the four .gz files of "
            "Fashion-MNIST in a folder and name it: make demo TASK=fashion-mnist DATA=FOLDER, or "
            "--task-arg folder=FOLDER",
            code="data_missing",
        )
    train, test = (
        (read_idx(folder / images), read_idx(folder / labels).astype(np.int64))
        for images, labels in _FILES
    )
    return train, test


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a gzipped IDX file in the shape that its header gives.

    Raises:
        FedSelectError: not such a file, or shorter or longer than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise FedSelectError(f"{path} cannot be read: {error}", code="data_invalid") from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, then each as 4 bytes.
    if data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise FedSelectError(f"{path} is no IDX file of bytes", code="data_invalid")
    head = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:head], dtype=">u4").astype(int).tolist())
    values = np.frombuffer(data[head:], dtype=np.uint8)
    if values.size != np.prod(shape):
        raise FedSelectError(
            f"{path} has {values.size} values, its header says {shape}", code="data_invalid"
        )
    return values.reshape(shape)
