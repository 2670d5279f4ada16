"""Bounded influence on stored files: the change of one update, and a shard's bounded average.

Owns reading for both, a block of 65,536 elements of all clients at a time. The arithmetic is
``fedselect.bounded``. Must not know rows or jobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from app.jobs import Progress
from app.storage import Storage
from fedselect.bounded import bounded_range, changes, frozen
from fedselect.clipping import SquareSum
from fedselect.likeness import Sketch
from fedselect.manifestdocs import Manifest, ManifestUpdate
from fedselect.masks import BLOCK
from fedselect.space import FloatVector
from workers import shards


@dataclass(frozen=True, slots=True)
class Change:
    """How far an update moves its base, and a sketch of where to."""

    norm: float
    sketch: bytes


def measured(
    storage: Storage, update: ManifestUpdate, base: str | None, elements: int, progress: Progress
) -> Change:
    """The change of an accepted update; ``base`` is the key of the version that its values count
    from, None if they are deltas.

    Raises:
        Missing: a file is not there (any more).
    """
    total, sketch = SquareSum(), Sketch()
    for start in range(0, elements, BLOCK):
        stop = min(start + BLOCK, elements)
        part = shards.read_update(storage, update, start, stop)
        zeros = np.zeros(stop - start, dtype=np.float32)
        values = zeros if base is None else shards.read_base(storage, base, start, stop)
        found = changes(values, part)
        total.add(found)
        sketch.add(found)
        progress()
    return Change(total.norm(), sketch.to_bytes())


@dataclass(frozen=True, slots=True)
class BoundedShard:
    """One shard of a round whose manifest has bounds, to be finished as running sums are."""

    storage: Storage
    manifest: Manifest
    start: int
    progress: Progress

    def finish(self, base: FloatVector, k: int) -> FloatVector:
        """The new values of the shard, shape (n,) in and out; zeros in where values are deltas."""
        bounds, factors = frozen(self.manifest)
        out = np.empty(base.size, dtype=np.float32)
        for first in range(0, base.size, BLOCK):
            last = min(first + BLOCK, base.size)
            parts = []
            for update in self.manifest.updates:
                span = (self.start + first, self.start + last)
                parts.append(shards.read_update(self.storage, update, *span))
                self.progress()
            out[first:last] = bounded_range(base[first:last], parts, factors, bounds, k)
        return out
