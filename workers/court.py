"""Where files are judged: starting judges, talking to them, and surviving them.

Owns the processes of ``workers.judge``. One of them that dies, hangs or answers nonsense costs an
attempt of the job, never its worker. Only waiting for the judge counts against its time.

Whose fault a death is: the judge's own limits of memory and processor time are far above what any
honest file takes, so a file that a new judge cannot finish within them is refused. Whatever else
ends a judge (a signal from outside, the host's lack of memory, a crash of ours, a busy machine) is
the service's failure, and so are the limits of one that has judged before.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedselect import wire
from fedselect.errors import WireError
from fedselect.masks import packed_size
from fedselect.space import ParameterSpace
from workers.judge import LENGTH, NO_MEMORY

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-E", "-s", "-m", "workers.judge")
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # nothing of ours, no secret
FILES = 1000  # that one process judges
CPU_TIME, WALL_TIME = 10.0, 20.0  # seconds for a small file
THROUGHPUT = 20 * 1024**2  # bytes, or elements, a second that a large one must reach
LONGEST_VERDICT = 64 * 1024
OWN_LIMITS = {NO_MEMORY: "memory", -signal.SIGXCPU: "time"}  # exit statuses


class JudgeDied(RuntimeError):  # noqa: N818  # what happened, not whose mistake it was
    """The judge did not come to a verdict: the attempt has failed, the worker goes on."""


@dataclass(frozen=True, slots=True)
class Case:
    """A file of ``size`` bytes; ``plan`` is that of an update, None for a model's weights."""

    size: int
    space: ParameterSpace
    plan: wire.UpdatePlan | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out: a refusal, or the examples and the mask (empty if none was sent)."""

    refusal: WireError | None
    examples: int
    mask: bytes


class Judge:
    """One process. A case is opened, fed and decided; only then may the next one come."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=ROOT,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        streams = (self._process.stdin, self._process.stdout)
        self._input, self._output = (stream.fileno() for stream in streams if stream)
        os.set_blocking(self._input, False)
        os.set_blocking(self._output, False)
        self.pid = self._process.pid
        self.files = 0
        self.at_rest = True
        self._left = WALL_TIME
        self._longest_mask = 0

    def open(self, case: Case) -> None:
        """Begin a file.

        Raises:
            JudgeDied: as everywhere here.
            WireError: file_too_costly, as everywhere here.
        """
        # Coded deltas that are all alike take few bytes and as many values as any others.
        allowance = max(case.size, case.space.dim) / THROUGHPUT
        self.at_rest, self.files = False, self.files + 1
        self._left = WALL_TIME + allowance
        self._longest_mask = packed_size(case.space.dim)
        order = {
            "size": case.size,
            "dim": case.space.dim,
            "space": case.space.digest,
            "seconds": CPU_TIME + allowance,
            "plan": case.plan and _head_of(case.plan),
        }
        self._send(json.dumps(order).encode())
        if case.plan is not None:
            known = case.plan.known_mask
            for mask in (case.plan.lower, case.plan.upper, known):
                self._send(mask.to_bytes() if mask else b"")

    def feed(self, data: bytes) -> None:
        """Hand over the next bytes of the file."""
        if data:
            self._send(data)

    def decide(self) -> Verdict:
        """End the file and wait for the verdict."""
        self._send(b"")
        answer, mask = self._receive(LONGEST_VERDICT), self._receive(self._longest_mask)
        verdict = self._understood(answer, mask)
        self.at_rest = True
        return verdict

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        self._process.wait()

    def _understood(self, answer: bytes, mask: bytes) -> Verdict:
        try:
            document: dict[str, Any] = json.loads(answer)
            if "code" in document:
                refusal = WireError(str(document["detail"]), code=str(document["code"]))
                return Verdict(refusal, 0, b"")
            return Verdict(None, int(document.get("examples", 0)), mask)
        except (ValueError, TypeError, KeyError) as error:
            raise self._died("gave an answer that is none") from error

    def _send(self, data: bytes) -> None:
        view = memoryview(LENGTH.pack(len(data)) + data)
        while view:
            try:
                view = view[os.write(self._input, view) :]
            except BlockingIOError:
                self._wait(self._input, select.POLLOUT)
            except BrokenPipeError as error:
                raise self._died("ended") from error

    def _receive(self, most: int) -> bytes:
        (length,) = LENGTH.unpack(self._read(LENGTH.size))
        if length > most:
            raise self._died("gave an answer that is too long")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._wait(self._output, select.POLLIN)
            piece = os.read(self._output, count - len(data))
            if not piece:
                raise self._died("ended")
            data += piece
        return bytes(data)

    def _wait(self, stream: int, event: int) -> None:
        poll = select.poll()
        poll.register(stream, event)
        begun = time.monotonic()
        if not poll.poll(max(0.0, self._left) * 1000):
            raise self._died("took too long")
        self._left -= time.monotonic() - begun

    def _died(self, what: str) -> JudgeDied | WireError:
        code = self._process.wait(timeout=5) if what == "ended" else None
        if code in OWN_LIMITS and self.files == 1:
            text = (
                f"judging the file takes more {OWN_LIMITS[code]} than any honest file of its size"
            )
            return WireError(text, code="file_too_costly")
        how = "" if code is None else f" (exit status {code})"
        return JudgeDied(f"the process that judges files {what}{how}")


def _head_of(plan: wire.UpdatePlan) -> dict[str, Any]:
    names = (
        "space",
        "run",
        "round",
        "assignment",
        "base_version",
        "known_mask_version",
        "encoding",
    )
    return {name: getattr(plan, name) for name in (*names, "max_abs", "max_norm")}


class Court:
    """Judges that are kept for the next file."""

    def __init__(self) -> None:
        self._idle: list[Judge] = []

    @contextmanager
    def judge(self, *, new: bool = False) -> Iterator[Judge]:
        """A judge for one file; one that did not come to its end is not used again.

        ``new``: one that has judged nothing before, so that whatever it costs is this file's doing.
        """
        if new:
            self.close()
        judge = self._idle.pop() if self._idle else Judge()
        try:
            yield judge
        finally:
            if judge.at_rest and judge.files < FILES:
                self._idle.append(judge)
            else:
                judge.close()

    def close(self) -> None:
        """End all that wait."""
        while self._idle:
            self._idle.pop().close()


COURT = Court()
atexit.register(COURT.close)
