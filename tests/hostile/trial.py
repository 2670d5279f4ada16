"""Putting files before the real judge, and what it cost."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedselect import wire
from fedselect.errors import WireError
from workers.court import Case, Court, JudgeDied

from . import corpus_deltas
from .corpus import GOOD, KNOWN, PLAN, SPACE, honest

CHUNK = 64 * 1024
DIED = "the judge died"


@dataclass
class Trial:
    """A court of its own; ``slowest`` in seconds and ``peak`` in bytes are over all files so far,
    a judge's start-up not counted.
    """

    court: Court = field(default_factory=Court)
    slowest: float = 0.0
    peak: int = 0
    deaths: int = 0

    def outcome(self, data: bytes, plan: wire.UpdatePlan) -> str:
        """The code of a refusal, ``ok``, or that the judge died."""
        try:
            with self.court.judge() as judge:
                if judge.files == 0:
                    judge.open(Case(0, SPACE, plan))  # it answers once it has started
                    judge.decide()
                begun = time.perf_counter()
                judge.open(Case(len(data), SPACE, plan))
                for start in range(0, len(data), CHUNK):
                    judge.feed(data[start : start + CHUNK])
                verdict = judge.decide()
                self.slowest = max(self.slowest, time.perf_counter() - begun)
                self.peak = max(self.peak, peak_memory(judge.pid))
        except JudgeDied:
            self.deaths += 1
            return DIED
        return verdict.refusal.code if verdict.refusal else "ok"


def peak_memory(pid: int) -> int:
    """The largest resident size a process has had, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def expected(data: bytes, plan: wire.UpdatePlan) -> str:
    """The same, decided here by the decoder of whole files; what is good says one thing only."""
    try:
        found = wire.decode_update(data, plan)
    except WireError as error:
        return error.code
    if found.codes is not None:  # a stream has many spellings, what it says has one
        again = wire.encode_delta(
            found.meta, found.codes, mask=found.mask, send_mask=found.mask_sent
        )
        same = wire.decode_update(again, plan).values.tobytes() == found.values.tobytes()
        return "ok" if same else "another reading of the same file"
    theta = np.zeros(SPACE.dim, dtype=np.float32)
    theta[~found.mask.to_bool()] = found.values
    again = wire.encode_update(found.meta, theta, mask=found.mask, send_mask=found.mask_sent)
    return "ok" if again == data else "another spelling was let through"


# --- mutations ---------------------------------------------------------------------------------

WITHOUT_MASK = honest(mask=None)
SEEDS = (
    (GOOD, PLAN),
    (WITHOUT_MASK, KNOWN),
    (corpus_deltas.GOOD, corpus_deltas.PLAN),
    (corpus_deltas.STREAMED, corpus_deltas.PLAN),
    (corpus_deltas.GOOD_WIDE, corpus_deltas.WIDE),
    (corpus_deltas.WITHOUT_MASK, corpus_deltas.KNOWN),
)
NUMBERS = (0, 1, 7, 8, 255, 2**16, 2**18, 2**31, 2**32, 2**63, 2**64 - 1)


def mutated(count: int, seed: int) -> Iterator[tuple[bytes, wire.UpdatePlan]]:
    """Damaged copies of honest files: one to three changes each."""
    rng = random.Random(seed)
    for _ in range(count):
        data, plan = rng.choice(SEEDS)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = rng.choice(MUTATIONS)(rng, data)
        yield data, plan


def _place(rng: random.Random, data: bytes) -> int:
    """Half of all changes are made in the head, a small part of the file."""
    return rng.randrange(min(len(data), 900) if rng.random() < 0.5 else len(data)) if data else 0


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = _place(rng, data)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1000)))


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    filling = rng.choice(
        (bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start))
    )
    return data[:start] + filling + data[stop:]


def cut_out(rng: random.Random, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    return data[:start] + data[stop:]


def insert(rng: random.Random, data: bytes) -> bytes:
    place = _place(rng, data)
    return data[:place] + rng.randbytes(rng.choice((1, 4, 8, 100))) + data[place:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """A piece of this file, or of another one, somewhere else."""
    other = rng.choice(SEEDS)[0]
    start, stop = _span(rng, other)
    place = _place(rng, data)
    return data[:place] + other[start:stop] + data[place + (stop - start) :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(9), data[:100]))


def edit_length(rng: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    number = rng.choice((*NUMBERS, length + 8, length - 8, length + 1)) % 2**64
    return struct.pack("<Q", number) + data[8:]


def edit_header(rng: random.Random, data: bytes) -> bytes:
    """Exchange a word or number of the header, and correct its length."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    if length > len(data):
        return data
    text = data[8 : 8 + length].rstrip(b" ")
    old, new = rng.choice(EDITS)
    text = text.replace(old, new, 1)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


EDITS = (
    [(b'"120"', b'"%d"' % n) for n in NUMBERS]
    + [(b"[0,24]", b"[0,%d]" % n) for n in NUMBERS]
    + [(b'"shape":[3]', b'"shape":[%d]' % n) for n in NUMBERS]
    + [
        (b'"F32"', b'"F64"'),
        (b'"U8"', b'"BOOL"'),
        (b'"U64"', b'"I64"'),
        (b"mask", b"Mask"),
        (b'"values"', b'"mask"'),
        (b'"mask_version":"1"', b'"mask_version":"2"'),
        (b",", b", "),
        (b'"round":"3"', b'"round":3'),
        (b'"round":"3"', b'"round":"03"'),
        (b"}", b"}}"),
        (b"{", b"["),
        (b'"run"', b'"round"'),
        (b"f32", b"bf16"),
        (b'"', b"'"),
        (b":", b":-"),
        (b"0", b"0.0"),
    ]
)
MUTATIONS = (
    flip_bits,
    overwrite,
    cut_out,
    insert,
    splice,
    truncate,
    extend,
    edit_length,
    edit_header,
)
