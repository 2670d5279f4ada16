"""Likeness: whether two updates change the same way, told from a kilobyte of each.

Owns the sketch of a change and the comparison of two. A sketch adds every element, with a sign, to
one of 256 sums, by a hash of the element's number (Charikar, Chen and Farach-Colton 2002): the
cosine of two sketches is that of the changes, give or take 0.06 for changes that have nothing in
common and ever less for changes that are alike. Must not know whose they are.

It finds copies and copies with noise, not somebody who knows the hash and works against it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedselect.clipping import Changes

SUMS = 256


class Sketch:
    """The sketch of a change that arrives in pieces, from the first element on."""

    def __init__(self) -> None:
        self._sums = np.zeros(SUMS)
        self._position = 0

    def add(self, changes: Changes) -> None:
        """The changes of the next elements, shape (n,)."""
        hashed = _mixed(np.arange(self._position, self._position + changes.size, dtype=np.uint64))
        signs = np.where(hashed >> np.uint64(63), -1.0, 1.0)
        sums = (hashed & np.uint64(SUMS - 1)).astype(np.int64)
        self._sums += np.bincount(sums, weights=signs * changes, minlength=SUMS)
        self._position += changes.size

    def to_bytes(self) -> bytes:
        """256 little-endian float32 of length 1 together; zeros for a change of nothing."""
        length = float(np.sqrt(np.square(self._sums).sum()))
        return (self._sums / (length or 1.0)).astype("<f4").tobytes()


def cosine(one: bytes, other: bytes) -> float:
    """Of two changes, from their sketches: 1 for the same direction, -1 for the opposite."""
    a, b = np.frombuffer(one, "<f4"), np.frombuffer(other, "<f4")
    return float(a.astype(np.float64) @ b.astype(np.float64))


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    found = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))
