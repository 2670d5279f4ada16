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
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import nn

from fedselect.errors import FedSelectError
from fedselect.personal import write_atomically
from fedselect.space import FloatVector
from fedselect.tasks.datasets import CACHE, Dataset
from fedselect.tasks.federations import Convolutions, SplitTask, federation
from fedselect.tasks.splits import deal

SUBJECTS = 10
WINDOW = 100  # samples: 2 s at 50 Hz
STEP = 50
_CACHE_FILE = "watch-1.npz"
_FIELDS = ("samples", "lengths", "exercise", "subject")

Recordings = dict[str, np.ndarray]


class WatchTask(SplitTask):
    """One person: 7 exercises, a 1-D CNN of 4,535 parameters.

    Training windows (6, 100) are a quarter, drawn with ``seed``, of those in the first half of
    each recording, about 55, held-out windows all of the second half; no window crosses the middle.
    The channels are left in the units of the watch, so that no statistic has to be shared. ``seed``
    gives the starting weights too; it must be the same for all people. ``cache`` is the folder of
    the converted data (by default ``~/.cache/fedselect``).

    Raises:
        FedSelectError: no such subject, or seglearn is not installed.
    """

    def __init__(self, subject: int, *, seed: int = 0, cache: str | Path | None = None) -> None:
        if subject not in range(1, SUBJECTS + 1):
            raise FedSelectError(f"subject must be 1 to {SUBJECTS}, got {subject!r}")
        found = dataset(Path(cache) if cache else CACHE)
        split = federation("watch").split
        manifest = deal(found, split, seed=seed, noun="subject")
        super().__init__(found, manifest.clients[f"subject-{subject:02d}"], seed=seed)

    def network(self) -> nn.Module:
        """Two convolutions, the mean over time, one linear layer."""
        return Convolutions(1, 6, 7)


def dataset(cache: Path = CACHE) -> Dataset:
    """All windows, recording after recording; those of second halves are held out.

    Raises:
        FedSelectError: seglearn is not installed.
    """
    recordings = _recordings(cache)
    starts = np.concatenate(([0], np.cumsum(recordings["lengths"])))
    windows, counts = [], []
    for start, stop in pairwise(starts):
        samples = recordings["samples"][start:stop]
        halves = [_cut(half) for half in np.split(samples, [len(samples) // 2])]
        windows += [window for half in halves for window in half]
        counts.append([len(half) for half in halves])
    halves_of = np.array(counts)  # (recordings, 2)
    each = halves_of.sum(1)
    return Dataset(
        "watch",
        np.stack(windows),
        np.repeat(recordings["exercise"], each),
        groups=np.repeat(recordings["subject"], each),
        held_out=np.repeat(np.tile([False, True], len(each)), halves_of.reshape(-1)),
        blocks=np.repeat(np.arange(len(each)), each),
    )


def _cut(samples: FloatVector) -> list[FloatVector]:
    """Windows of shape (6, WINDOW) from samples (n, 6)."""
    return [samples[s : s + WINDOW].T for s in range(0, len(samples) - WINDOW + 1, STEP)]


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
