"""Noising: the private sum of one shard, from stored updates.

Owns the order of reading: a client's delta is measured as a whole before any of it is added. What a
process has measured it remembers, for the next shards of the round. The arithmetic is
``fedselect.private``.
"""

from __future__ import annotations

from app.jobs import Progress
from app.storage import Storage
from app.wiring import Coordinator
from fedselect.errors import SettingsError
from fedselect.kernels import Part
from fedselect.manifestdocs import Manifest, ManifestNoise, ManifestUpdate
from fedselect.noise import commitment, round_key, run_secret
from fedselect.private import PrivateSum, add_squares, shrink
from fedselect.recompute import manifest_digest
from fedselect.space import FloatVector
from workers import shards

Span = tuple[int, int]
MOST = 10_000  # lengths that a process remembers
_measured: dict[tuple[str, str, str, int], float] = {}


def key(core: Coordinator, manifest: Manifest) -> bytes:
    """The key of a round's noise.

    Raises:
        SettingsError: ``noise_key_missing``: the secret is not the one that the run began with.
    """
    rule = noise_of(manifest)
    master = core.settings.noise_seed
    secret = None if master is None else run_secret(master, manifest.run)
    if secret is None or commitment(secret) != rule.commitment:
        raise SettingsError(
            "NOISE_KEY is not the one that this run began with, and its noise must be drawn with "
            "that: set it again, then retry the job",
            code="noise_key_missing",
        )
    return round_key(secret, manifest_digest(manifest))


def noise_of(manifest: Manifest) -> ManifestNoise:
    """The rule of a manifest that has one."""
    if manifest.noise is None:
        raise RuntimeError("a manifest without noise has no private sum")
    return manifest.noise


def summed(
    storage: Storage, manifest: Manifest, span: Span, key: bytes, progress: Progress
) -> PrivateSum:
    """The sum of all updates over elements [start, stop)."""
    rule = noise_of(manifest)
    total = PrivateSum(rule, key, span)
    for update in manifest.updates:
        squares = _squares(storage, manifest, update, rule.step, progress)
        part, base = _read(storage, manifest, update, span)
        total.add(part, base, shrink(squares, rule.bound))
        progress()
    return total


def _squares(
    storage: Storage, manifest: Manifest, update: ManifestUpdate, step: int, progress: Progress
) -> float:
    """The squared length of a whole delta, in steps."""
    known = (update.sha256, update.mask_sha256, manifest.base_sha256, step)
    if known not in _measured:
        squares = 0.0
        for start in range(0, manifest.elements, manifest.shard):
            stop = min(start + manifest.shard, manifest.elements)
            squares = add_squares(squares, *_read(storage, manifest, update, (start, stop)), step)
            progress()
        if len(_measured) >= MOST:
            _measured.pop(next(iter(_measured)))
        _measured[known] = squares
    return _measured[known]


def _read(
    storage: Storage, manifest: Manifest, update: ManifestUpdate, span: Span
) -> tuple[Part, FloatVector | None]:
    """A client's part of a range, and what its values are measured from."""
    part = shards.read_update(storage, update, *span)
    deltas = manifest.encoding != "f32"
    return part, None if deltas else shards.read_base(storage, manifest.base_object, *span)
