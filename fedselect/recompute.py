"""Recompute a published version from its manifest, with the plain reference.

Owns the check that anyone can make who may read a manifest and its files. Must not fetch anything:
the caller hands over the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from fedselect import wire
from fedselect.aggregate import Contribution, reference
from fedselect.audit import canonical_json
from fedselect.bounded import bounded, frozen, norm_of
from fedselect.deltafiles import step
from fedselect.errors import LedgerError
from fedselect.manifestdocs import Manifest, ManifestUpdate
from fedselect.masks import Mask
from fedselect.noise import commitment, round_key
from fedselect.private import private_mean
from fedselect.space import FloatVector

Read = Callable[[str], bytes]


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 (hex) over the manifest's canonical JSON (RFC 8785)."""
    return hashlib.sha256(canonical_json(manifest.model_dump(mode="json"))).hexdigest()


def recompute(manifest: Manifest, read: Read, *, secret: bytes | None = None) -> bytes:
    """The version file that a manifest leads to; ``read`` gives an object's bytes by its key.

    ``secret`` is that of the run, if its manifests speak of noise (``noise.run_secret``).

    Raises:
        LedgerError: a file is not the one that the manifest names, or ``secret`` not the one that
            it is bound to (``noise_secret``).
        WireError: a file is malformed.
    """
    return recompute_files(manifest, read, secret=secret)[0]


def recompute_files(
    manifest: Manifest, read: Read, *, secret: bytes | None = None
) -> tuple[bytes, bytes | None]:
    """The version file, and in a run of deltas the delta file that leads to it; see
    :func:`recompute`.

    How DEFLATE finds its codes is not fixed: another build of zlib may write a delta file in other
    bytes, which lead to the same version.
    """
    version = _checked(read, manifest.base_object, manifest.base_sha256)
    base = wire.decode_version(version, space_digest=manifest.space, dim=manifest.elements)
    parts = [_contribution(manifest, update, read) for update in manifest.updates]
    deltas = manifest.encoding != "f32"
    if manifest.noise is not None:
        key = _noise_key(manifest, secret)
        found = private_mean(base, parts, manifest.noise, key, deltas=deltas)
    else:
        found = _averaged(manifest, np.zeros_like(base) if deltas else base, parts)
    if manifest.encoding == "f32":
        return wire.encode_version(manifest.space, found), None
    return step(version, found, space=manifest.space, encoding=manifest.encoding)


def _noise_key(manifest: Manifest, secret: bytes | None) -> bytes:
    if manifest.noise is None or secret is None or commitment(secret) != manifest.noise.commitment:
        raise LedgerError(
            "the manifest's noise needs the secret that it is bound to: the operator prints it "
            "with fedselect admin noise-secret",
            code="noise_secret",
        )
    return round_key(secret, manifest_digest(manifest))


def _averaged(manifest: Manifest, base: FloatVector, parts: Sequence[Contribution]) -> FloatVector:
    if manifest.bounds is None:
        return reference(base, parts, manifest.min_contributors)
    for update, part in zip(manifest.updates, parts, strict=True):
        if update.norm is not None and float(update.norm) != norm_of(base, part):
            raise LedgerError(
                f"update {update.number} does not change its base by the length of "
                f"{update.norm} that the manifest says",
                code="file_changed",
            )
    bounds, factors = frozen(manifest)
    return bounded(base, parts, factors, bounds, manifest.min_contributors)


def _contribution(manifest: Manifest, update: ManifestUpdate, read: Read) -> Contribution:
    mask_bytes = _checked(read, update.mask_object, update.mask_sha256)
    mask = Mask.from_bytes(manifest.elements, mask_bytes)
    data = _checked(read, update.object, update.sha256)
    return Contribution(mask, wire.update_values(data, mask), update.weight)


def _checked(read: Read, key: str, sha256: str) -> bytes:
    data = read(key)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise LedgerError(f"{key} is not the file with SHA-256 {sha256}", code="file_changed")
    return data
