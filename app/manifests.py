"""Manifests: the frozen list of what a round aggregates.

Owns their content, order and digest. Must not aggregate or move a round.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from uuid import UUID

from sqlalchemy import select

from app import encrypted
from app.db import Tx
from app.errors import Gone, Missing
from app.tables import ManifestRecord, MaskRecord, Model, Object, Round, Run, Update, Version
from app.wiring import Coordinator
from fedselect.accounting import noise_rule
from fedselect.audit import canonical_json
from fedselect.clipping import round_bound
from fedselect.manifestdocs import (
    GROUP,
    SHARD,
    Manifest,
    ManifestBounds,
    ManifestDocument,
    ManifestFormat,
    ManifestNoise,
    ManifestUpdate,
)
from fedselect.policies import Influence, RoundPolicy, RunSettings
from fedselect.protocol import FileDownload
from fedselect.space import ParameterSpace


def freeze(tx: Tx, run: Run, current: Round) -> int:
    """Write a closing round's manifest; returns the number of shards to aggregate."""
    model = tx.session.get_one(Model, run.model_id)
    base = tx.session.get_one(Version, current.base_version_id)
    settings = RunSettings.model_validate(run.settings)
    policy, encoding, rules = settings.round, settings.wire.encoding, settings.influence
    noise, updates = _noise(run, settings, model), accepted(tx, current.id, policy)
    manifest = Manifest(
        format=_format(settings),
        encoding=encoding,
        run=str(run.id),
        arm=str(current.arm_id),
        round=current.number,
        attempt=current.attempt,
        space=model.space_digest,
        elements=model.elements,
        base_object=base.object_key,
        base_sha256=base.sha256,
        min_contributors=policy.min_contributors,
        group=GROUP,
        shard=SHARD,
        noise=noise,
        bounds=None if rules is None else _bounds(tx, rules, base, updates),
        updates=updates,
    )
    body = canonical_json(manifest.model_dump(mode="json"))
    digest = hashlib.sha256(body).hexdigest()
    record = ManifestRecord(
        round_id=current.id, body=body.decode(), sha256=digest, created_at=tx.now
    )
    tx.session.add(record)
    return -(-model.elements // SHARD)


def _format(settings: RunSettings) -> ManifestFormat:
    if settings.privacy.dp is not None:
        return "fedselect-manifest/4"
    if settings.influence is not None:
        return "fedselect-manifest/3"
    return "fedselect-manifest/1" if settings.wire.encoding == "f32" else "fedselect-manifest/2"


def _noise(run: Run, settings: RunSettings, model: Model) -> ManifestNoise | None:
    if settings.privacy.dp is None:
        return None
    space = ParameterSpace.from_json(model.space)
    return noise_rule(settings, space, run.noise_commitment or "")


def _bounds(
    tx: Tx, rules: Influence, base: Version, updates: list[ManifestUpdate]
) -> ManifestBounds:
    """The bounds of a round, from the norms of the round before and, if there is none, its own."""
    before = [] if base.round_id is None else _norms(load(tx, base.round_id).updates)
    clip = round_bound(rules.clip_norm, rules.clip_quantile, before=before, own=_norms(updates))
    return ManifestBounds(
        rule=rules.rule,
        trim=repr(float(rules.trim)),
        clip=None if clip is None else repr(float(clip)),
        max_change=None if rules.max_change is None else repr(float(rules.max_change)),
        share_cap=rules.share_cap,
        movers=rules.movers,
    )


def _norms(updates: list[ManifestUpdate]) -> list[float]:
    return [float(each.norm) for each in updates if each.norm is not None]


def accepted(tx: Tx, round_id: UUID, policy: RoundPolicy) -> list[ManifestUpdate]:
    """What a round would aggregate if it closed now, in order; a withdrawn number is left out."""
    tx.session.flush()
    query = (
        select(Update, MaskRecord)
        .join(MaskRecord, MaskRecord.id == Update.mask_id)
        .where(Update.round_id == round_id, Update.withdrawn_at.is_(None))
        .order_by(Update.number)
    )
    return [
        ManifestUpdate(
            number=update.number,
            client=str(update.client_id),
            object=update.object_key,
            sha256=update.sha256,
            mask_object=mask.object_key,
            mask_sha256=mask.sha256,
            examples=update.examples,
            weight=update.examples if policy.weighting == "examples" else 1,
            norm=None if update.change_norm is None else repr(update.change_norm),
        )
        for update, mask in tx.session.execute(query)
    ]


def load(tx: Tx, round_id: UUID) -> Manifest:
    """A round's manifest.

    Raises:
        Missing: the round has not been closed.
    """
    return Manifest.model_validate(json.loads(_record(tx, round_id).body))


def digest(tx: Tx, round_id: UUID) -> str:
    """SHA-256 (hex) of a round's manifest."""
    return _record(tx, round_id).sha256


def bare(tx: Tx, round_id: UUID) -> ManifestDocument:
    """A manifest without addresses; this is there for ever."""
    record = _record(tx, round_id)
    manifest = Manifest.model_validate(json.loads(record.body))
    return ManifestDocument(sha256=record.sha256, manifest=manifest, downloads={})


def document(tx: Tx, round_id: UUID, *, core: Coordinator) -> ManifestDocument:
    """A manifest with signed addresses of all files it names, for whoever wants to recompute, and
    the keys of those that are encrypted.

    Raises:
        Gone: some of them were deleted, so the version is no longer recomputable.
    """
    record = _record(tx, round_id)
    manifest = Manifest.model_validate(json.loads(record.body))
    _check_there(tx, round_id, manifest)
    until = tx.now + timedelta(seconds=core.settings.url_lifetime)
    files = {manifest.base_object: manifest.base_sha256}
    for update in manifest.updates:
        files[update.object] = update.sha256
        files[update.mask_object] = update.mask_sha256
    sizes = _sizes(tx, round_id, manifest)
    downloads: dict[str, FileDownload] = {}
    for key, sha256 in files.items():
        signed = core.storage.sign_get(key, sha256=sha256, size=sizes[key], until=until)
        keys = core.ring.file_keys(key) if encrypted.is_one(key) else {}
        downloads[key] = FileDownload(**dict(signed), file_keys=keys)
    return ManifestDocument(sha256=record.sha256, manifest=manifest, downloads=downloads)


def _check_there(tx: Tx, round_id: UUID, manifest: Manifest) -> None:
    marked = select(Version.id).where(Version.round_id == round_id, ~Version.recomputable)
    keys = {key for u in manifest.updates for key in (u.object, u.mask_object)}
    gone = select(Object.key).where(
        Object.key.in_({*keys, manifest.base_object}), Object.deletion_id.is_not(None)
    )
    if tx.session.scalar(marked) or tx.session.scalar(gone.limit(1)):
        raise Gone(
            "files that this manifest names were deleted, so its version cannot be recomputed any "
            "more; with files=false you get the manifest itself",
            code="version_unrecomputable",
        )


def _sizes(tx: Tx, round_id: UUID, manifest: Manifest) -> dict[str, int]:
    query = select(Update.object_key, Update.size).where(Update.round_id == round_id)
    sizes: dict[str, int] = dict(tx.session.execute(query).all())
    base = select(Version.size).join(Round, Round.base_version_id == Version.id)
    sizes[manifest.base_object] = tx.session.scalars(base.where(Round.id == round_id)).one()
    for update in manifest.updates:
        sizes[update.mask_object] = -(-manifest.elements // 8)
    return {key: encrypted.stored_size(key, size) for key, size in sizes.items()}


def _record(tx: Tx, round_id: UUID) -> ManifestRecord:
    record = tx.session.get(ManifestRecord, round_id)
    if record is None:
        raise Missing("the round has no manifest: it has not been closed", code="manifest_missing")
    return record
