"""Memory and processor time of the processes that a benchmark started, asked while they live.

They are the descendants of this one, whatever their environment says. The kernel's own high-water
mark of a process cannot be missed between two looks; the sum over all of them counts shared pages
once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

EVERY = 0.5  # seconds between two looks
MIB = 1024**2


class Peaks:
    """Looks at all descendants of this process while the ``with`` block runs."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.single: dict[str, float] = {}  # highest RSS by command line, MiB
        self.total = 0.0  # highest sum of all proportional shares, MiB

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def largest(self, *words: str) -> float:
        """The highest RSS of one process whose command line has all these words, MiB."""
        return max(
            (peak for command, peak in self.single.items() if all(w in command for w in words)),
            default=0.0,
        )

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            total = 0.0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error, OSError):
                    total += self._look(process)
            self.total = max(self.total, total)

    def _look(self, process: psutil.Process) -> float:
        command = " ".join(process.cmdline())
        peak = high_water(process.pid)
        self.single[command] = max(peak, self.single.get(command, 0.0))
        return float(process.memory_full_info().pss) / MIB


def processor_time(kinds: Mapping[str, str]) -> dict[str, float]:
    """Seconds of processor time so far by kind: a word that the command lines of a kind have."""
    found = dict.fromkeys(kinds, 0.0)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command, times = " ".join(process.cmdline()), process.cpu_times()
            kind = next((name for name, word in kinds.items() if word in command), None)
            if kind is not None:
                found[kind] += times.user + times.system
    return found


def high_water(pid: int) -> float:
    """The highest RSS that this process ever had, MiB; 0 for one that is about to be gone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0
