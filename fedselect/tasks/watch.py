"""Shoulder exercises on a smartwatch, by the 10 people who did them: a natural split.

Owns windowing, the cache and this one task. The recordings (140, six channels at 50 Hz, seven
exercises; Burns et al., arXiv 1802.01489) come inside the package ``seglearn`` (BSD) as a pickle:
it is read once and kept as plain arrays, later starts unpickle nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import Tensor, nn

from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically
from fedselect.space import FloatVector
from fedselect.tasks.arrays import ArrayTask, Examples

SUBJECTS = 10
WINDOW = 100  # samples: 2 s at 50 Hz
STEP = 50
TRAIN_SHARE = 4  # every fourth window of the first half, about 55 per person
_CACHE_FILE = "watch-1.npz"
_FIELDS = ("samples", "lengths", "exercise", "subject")

Recordings = dict[str, np.ndarray]


class WatchTask(ArrayTask):
    """One person: 7 exercises, a 1-D CNN of 4,535 parameters.

    Training windows (6, 100) are a quarter, drawn with ``seed``, of those in the first half of
    each recording, held-out windows all of the second half; no window crosses the middle. The
    channels are left in the units of the watch, so that no statistic has to be shared. ``seed``
    gives the starting weights too; it must be the same for all people. ``cache`` is the folder of
    the converted data (by default ``~/.cache/fedselect``).

    Raises:
        FedSelectError: no such subject, or seglearn is not installed.
    """

    def __init__(self, subject: int, *, seed: int = 0, cache: str | Path | None = None) -> None:
        if subject not in range(1, SUBJECTS + 1):
            raise FedSelectError(f"subject must be 1 to {SUBJECTS}, got {subject!r}")
        recordings = _recordings(Path(cache) if cache else Path.home() / ".cache" / "fedselect")
        train, test = _windows(recordings, subject, seed)
        super().__init__(train, test, seed=seed)

    def network(self) -> nn.Module:
        """Two convolutions, the mean over time, one linear layer."""
        return _Network()


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 16, 7, stride=2)
        self.conv2 = nn.Conv1d(16, 32, 7, stride=2)
        self.out = nn.Linear(32, 7)

    def forward(self, windows: Tensor) -> Tensor:
        """Logits (n, 7) of windows (n, 6, 100)."""
        hidden = nn.functional.relu(self.conv1(windows))
        hidden = nn.functional.relu(self.conv2(hidden))
        logits: Tensor = self.out(hidden.mean(-1))
        return logits


def _windows(recordings: Recordings, subject: int, seed: int) -> tuple[Examples, Examples]:
    rng = np.random.default_rng([seed, subject])
    starts = np.concatenate(([0], np.cumsum(recordings["lengths"])))
    train: list[tuple[FloatVector, int]] = []
    test: list[tuple[FloatVector, int]] = []
    for index in np.flatnonzero(recordings["subject"] == subject):
        samples = recordings["samples"][starts[index] : starts[index + 1]]
        label, middle = int(recordings["exercise"][index]), len(samples) // 2
        first, second = _cut(samples[:middle]), _cut(samples[middle:])
        kept = rng.permutation(len(first))[: round(len(first) / TRAIN_SHARE)]
        train += [(first[i], label) for i in np.sort(kept)]
        test += [(window, label) for window in second]
    return _stack(train), _stack(test)


def _cut(samples: FloatVector) -> list[FloatVector]:
    """Windows of shape (6, WINDOW) from samples (n, 6)."""
    return [samples[s : s + WINDOW].T for s in range(0, len(samples) - WINDOW + 1, STEP)]


def _stack(examples: list[tuple[FloatVector, int]]) -> Examples:
    windows, labels = zip(*examples, strict=True)
    return np.stack(windows), np.array(labels, dtype=np.int64)


def _recordings(folder: Path) -> Recordings:
    path = folder / _CACHE_FILE
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            return {name: saved[name] for name in _FIELDS}
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile):
        found = _convert()  # no cache yet, or not one of ours
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **found)
    with contextlib.suppress(OSError):  # without a writable folder it is converted each time
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return found


def _convert() -> Recordings:
    data = _seglearn_datasets().load_watch()
    return {
        "samples": np.concatenate(data["X"]).astype(np.float32),
        "lengths": np.array([len(x) for x in data["X"]], dtype=np.int64),
        "exercise": np.asarray(data["y"], dtype=np.int64),
        "subject": np.asarray(data["subject"], dtype=np.int64),
    }


def _seglearn_datasets() -> ModuleType:
    # Only its loader: importing the package as a whole needs pandas, which it does not declare.
    package = importlib.util.find_spec("seglearn")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise FedSelectError(
            "the watch task needs the package seglearn: pip install 'fedselect[torch]'",
            code="data_missing",
        )
    path = Path(folders[0]) / "datasets.py"
    spec = importlib.util.spec_from_file_location("seglearn_datasets", path)
    if spec is None or spec.loader is None:
        raise FedSelectError(f"{path} cannot be loaded", code="data_missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
