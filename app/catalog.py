"""Models and versions: what is trained, and every set of shared parameters there has been.

Owns the ``models`` and ``versions`` rows. Must not know rounds or who trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import Select, select
from sqlalchemy.orm import aliased

from app import ledger
from app.auth import Principal
from app.db import Tx
from app.errors import Conflict, Gone, Missing
from app.storage import Storage
from app.tables import Arm, Model, Object, Version
from fedselect import __version__
from fedselect.checkindocs import DeltaDownload
from fedselect.downloads import LONGEST_CHAIN, DeltaFacts, cheapest
from fedselect.protocol import Download, ModelCreate, ModelInfo, VersionInfo
from fedselect.space import ParameterSpace
from fedselect.versiondocs import SpaceDocument


def register_model(tx: Tx, principal: Principal, body: ModelCreate) -> ModelInfo:
    """Register a model by its parameter space.

    Raises:
        SpaceError: not a usable parameter space.
        Conflict: the project has a model of that name.
    """
    space = ParameterSpace.from_json(body.space)
    project = principal.project_id
    model = Model(
        id=uuid4(),
        project_id=project,
        name=body.name,
        space=space.to_json(),
        space_digest=space.digest,
        elements=space.dim,
        created_at=tx.now,
    )
    taken = Conflict(f"there is already a model named {body.name!r}", code="model_name_taken")
    tx.insert(model, taken=taken)
    ledger.append(
        tx,
        "model.registered",
        f"model:{model.id}",
        project=project,
        body={"name": model.name, "space": space.digest, "elements": space.dim},
    )
    return model_info(model, None)


def add_initial_version(tx: Tx, model: Model, *, object_key: str, sha256: str, size: int) -> None:
    """Give a model its initial weights, once."""
    version = Version(
        id=uuid4(),
        project_id=model.project_id,
        model_id=model.id,
        number=0,
        object_key=object_key,
        sha256=sha256,
        size=size,
        code_version=__version__,
        created_at=tx.now,
    )
    tx.session.add(version)
    ledger.append(
        tx,
        "version.imported",
        f"version:{version.id}",
        project=model.project_id,
        body={"model": str(model.id), "sha256": sha256, "size": size},
    )


def initial_version(tx: Tx, model_id: UUID) -> Version | None:
    """A model's initial weights, None before they are uploaded and verified."""
    query = select(Version).where(Version.model_id == model_id, Version.arm_id.is_(None))
    return tx.session.scalars(query).first()


def newest_version(tx: Tx, arm_id: UUID) -> Version:
    """The last version of an arm; every arm has number 0."""
    query = select(Version).where(Version.arm_id == arm_id).order_by(Version.number.desc()).limit(1)
    return tx.session.scalars(query).one()


def origin_version(tx: Tx, arm_id: UUID) -> Version:
    """The arm's version 0."""
    return tx.session.scalars(
        select(Version).where(Version.arm_id == arm_id, Version.number == 0)
    ).one()


def run_of(tx: Tx, arm_id: UUID) -> UUID:
    """The run that an arm belongs to."""
    return tx.session.get_one(Arm, arm_id).run_id


def get_model(tx: Tx, principal: Principal, model_id: UUID, *, lock: bool = False) -> Model:
    """A model of the principal's project; ``lock`` it, while rows may go on to point at it.

    Raises:
        Missing: there is none.
    """
    query = select(Model).where(Model.id == model_id, Model.project_id == principal.project_id)
    query = query.with_for_update(key_share=True) if lock else query
    model = tx.session.scalars(query).first()
    if model is None:
        raise Missing(f"there is no model {model_id} in this project")
    return model


def space_document(tx: Tx, principal: Principal, model_id: UUID) -> SpaceDocument:
    """A model's parameter space as the interface shows it.

    Raises:
        Missing: there is no such model.
    """
    model = get_model(tx, principal, model_id)
    return SpaceDocument(
        digest=model.space_digest, elements=model.elements, tensors=model.space["tensors"]
    )


def get_version(tx: Tx, principal: Principal, version_id: UUID) -> Version:
    """A version of the principal's project.

    Raises:
        Missing: there is none.
    """
    query = select(Version).where(
        Version.id == version_id, Version.project_id == principal.project_id
    )
    version = tx.session.scalars(query).first()
    if version is None:
        raise Missing(f"there is no version {version_id} in this project")
    return version


def download(
    tx: Tx, principal: Principal, version_id: UUID, *, storage: Storage, lifetime: float
) -> Download:
    """A signed address of a version file.

    Raises:
        Gone: it was deleted.
    """
    version = get_version(tx, principal, version_id)
    check_there(tx, version)
    until = tx.now + timedelta(seconds=lifetime)
    return storage.sign_get(
        version.object_key, sha256=version.sha256, size=version.size, until=until
    )


def check_there(tx: Tx, version: Version) -> None:
    """Refuse what needs a version's file if it was deleted.

    Raises:
        Gone: it was.
    """
    if tx.session.get_one(Object, version.object_key).deletion_id is not None:
        raise Gone(f"the file of version {version.number} was deleted", code="version_deleted")


def deltas_to(
    tx: Tx, version: Version, held: Sequence[str], *, storage: Storage, lifetime: float
) -> list[DeltaDownload] | None:
    """The smallest way to a version for a client that holds those of these digests.

    Signed addresses of delta files in the order in which they are applied, none if it holds the
    version; None: the whole file is smaller, or the only way.
    """
    if version.sha256 in held:
        return []
    files = _leading_to(tx, version) if held and version.delta_key else {}
    chain = cheapest(list(files), target=version.sha256, size=version.size, held=held)
    if chain is None:
        return None
    until = tx.now + timedelta(seconds=lifetime)

    def sign(facts: DeltaFacts) -> Download:
        key, sha256 = files[facts]
        return storage.sign_get(key, sha256=sha256, size=facts.size, until=until)

    return [DeltaDownload(base=f.base, result=f.result, download=sign(f)) for f in chain]


def _leading_to(tx: Tx, version: Version) -> dict[DeltaFacts, tuple[str, str]]:
    """Key and SHA-256 of an arm's last delta files up to a version, the newest first."""
    parent = aliased(Version)
    query = (
        select(parent.sha256, Version)
        .join(parent, parent.id == Version.parent_id)
        .join(Object, Object.key == Version.delta_key)
        .where(
            Version.arm_id == version.arm_id,
            Version.number <= version.number,
            Version.number > version.number - LONGEST_CHAIN,
            Object.deletion_id.is_(None),
        )
        .order_by(Version.number.desc())
    )
    return {
        DeltaFacts(base, found.sha256, found.delta_size): (found.delta_key, found.delta_sha256)
        for base, found in tx.session.execute(query)
        if found.delta_key and found.delta_sha256 and found.delta_size
    }


def models(principal: Principal) -> Select[Model]:
    """The principal's models."""
    return select(Model).where(Model.project_id == principal.project_id)


def model_infos(tx: Tx, found: list[Model]) -> list[ModelInfo]:
    """Models as the interface shows them, with one query for all of them."""
    query = select(Version).where(
        Version.model_id.in_([m.id for m in found]), Version.arm_id.is_(None)
    )
    initial = {v.model_id: v for v in tx.session.scalars(query)}
    return [model_info(m, initial.get(m.id)) for m in found]


def model_info(model: Model, initial: Version | None) -> ModelInfo:
    """The model as the interface shows it."""
    return ModelInfo(
        id=model.id,
        name=model.name,
        space_digest=model.space_digest,
        elements=model.elements,
        initial_version=version_info(initial) if initial else None,
        created_at=model.created_at,
    )


def version_info(version: Version) -> VersionInfo:
    """The version as the interface shows it."""
    return VersionInfo.model_validate(version, from_attributes=True)
