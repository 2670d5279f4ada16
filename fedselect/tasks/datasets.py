"""Data sets as plain arrays: what splits are made of, with a digest that names them.

Owns the arrays, their file in the cache folder and that file's checks. Must not know where a data
set comes from (``sources``) or how it is dealt to clients (``splits``). Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically
from fedselect.tasks.arrays import Examples, IntVector

CACHE = Path.home() / ".cache" / "fedselect"
Inputs = npt.NDArray[np.float32] | npt.NDArray[np.uint8]
BoolVector = npt.NDArray[np.bool_]
_SUFFIX = ".data.npz"
_KINDS = {"inputs": "fu", "labels": "i", "groups": "i", "held_out": "b", "blocks": "i"}


@dataclass(frozen=True, eq=False)
class Dataset:
    """n examples with their labels; everything optional is what the data set says of itself.

    ``inputs`` (n, …) are float32, or uint8 that stand for 0 to 1; ``labels`` (n,) count from 0.
    ``groups`` (n,) say whose example it is (a person, a site), ``held_out`` (n,) whether it is of
    the data set's own test part, ``blocks`` (n,) which examples were recorded together.

    Raises:
        FedSelectError: ``data_invalid``, arrays that do not belong together.
    """

    name: str
    inputs: Inputs
    labels: IntVector
    groups: IntVector | None = None
    held_out: BoolVector | None = None
    blocks: IntVector | None = None

    def __post_init__(self) -> None:
        rows = len(self.labels)
        for name, array in self.arrays().items():
            one = array.ndim == 1 or name == "inputs"
            if not one or len(array) != rows or array.dtype.kind not in _KINDS[name]:
                raise _error(f"{self.name}: {name} has {array.dtype} of shape {array.shape}")
        if rows == 0 or int(self.labels.min()) < 0:
            raise _error(f"{self.name} has no examples, or labels below 0")
        if self.inputs.dtype.kind == "f" and not np.isfinite(self.inputs).all():
            raise _error(f"{self.name} has inputs that are not finite")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Every array that is there, by name."""
        found = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def classes(self) -> int:
        """Labels are below this."""
        return int(self.labels.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all arrays with their names, types and shapes."""
        digest = hashlib.sha256(b"fedselect-dataset/1\n")
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def examples(self, rows: IntVector) -> Examples:
        """Inputs (k, …) as float32 and labels (k,) of some rows."""
        inputs = self.inputs[rows].astype(np.float32)
        if self.inputs.dtype == np.uint8:
            inputs /= 255
        return inputs, self.labels[rows]


def path_of(name: str, folder: Path) -> Path:
    """Where a data set lies in a cache folder."""
    if not name.replace("-", "").isalnum():
        raise _error(f"a data set is named by letters, digits and dashes, not {name!r}")
    return folder / f"{name}{_SUFFIX}"


def names_in(folder: Path) -> list[str]:
    """The data sets that lie in a cache folder."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}"))


def save(dataset: Dataset, folder: Path) -> Path:
    """Keep a data set in a cache folder."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **dataset.arrays())
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(dataset.name, folder)
    write_atomically(path, buffer.getvalue())
    return path


def load(name: str, folder: Path) -> Dataset:
    """A data set from a cache folder.

    Raises:
        FedSelectError: ``data_missing``; or ``data_invalid``, what lies there is none.
    """
    path = path_of(name, folder)
    if not path.is_file():
        raise FedSelectError(
            f"the data set {name} is not in {folder}; get it with: fedselect data get {name}",
            code="data_missing",
        )
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            arrays: Mapping[str, npt.NDArray[Any]] = {key: saved[key] for key in saved.files}
        return Dataset(name, **arrays)
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise _error(f"{path} is not one of our data sets ({error}); remove it") from error


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="data_invalid")
