"""Every table, in the order of the story that it tells: who, what, runs, rounds, work, ledger.

Owns columns, keys and constraints. Must not contain rules; relationships are never lazy-loaded,
because there are none: modules join on purpose.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID, uuid4

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fedselect.lifecycle import AssignmentState, RoundState, RunState
from fedselect.rollout import ACTIVE_ROLLOUTS
from fedselect.rolloutdocs import RolloutState

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        str: Text,
        int: BigInteger,
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
        bytes: LargeBinary,
    }


Table.metadata.naming_convention = NAMING


def _id() -> Mapped[UUID]:
    return mapped_column(primary_key=True, default=uuid4)


def _listed(values: list[str]) -> str:
    return ", ".join(f"'{value}'" for value in values)


def _one_of(column: str, values: list[str]) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({_listed(values)})", name=f"{column}_known")


# --- who ---------------------------------------------------------------------------------------


class Organisation(Table):
    """Who owns projects."""

    __tablename__ = "organisations"
    id: Mapped[UUID] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    client_limit: Mapped[int | None]


class Project(Table):
    """Who owns everything else; every row below leads to exactly one project."""

    __tablename__ = "projects"
    __table_args__ = (UniqueConstraint("organisation_id", "name"),)
    id: Mapped[UUID] = _id()
    organisation_id: Mapped[UUID] = mapped_column(ForeignKey("organisations.id"))
    name: Mapped[str]
    created_at: Mapped[datetime]
    client_limit: Mapped[int | None]


class Client(Table):
    """A registered participant."""

    __tablename__ = "clients"
    __table_args__ = (
        UniqueConstraint("project_id", "name"),
        _one_of("state", ["active", "suspended", "revoked"]),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    tags: Mapped[list[str]]
    state: Mapped[str]
    created_at: Mapped[datetime]
    last_seen_at: Mapped[datetime | None]
    erased_at: Mapped[datetime | None]
    forgiven_at: Mapped[datetime | None]  # strikes before it do not count
    minute: Mapped[datetime | None]
    minute_calls: Mapped[int] = mapped_column(server_default="0", default=0)
    day: Mapped[datetime | None]
    day_bytes: Mapped[int] = mapped_column(server_default="0", default=0)


class Key(Table):
    """An API key; only its HMAC is kept. Without a project it is for the whole organisation."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    organisation_id: Mapped[UUID] = mapped_column(ForeignKey("organisations.id"), index=True)
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"), index=True)
    client_id: Mapped[UUID | None] = mapped_column(ForeignKey("clients.id"), index=True)
    name: Mapped[str] = mapped_column(server_default="")
    role: Mapped[str]
    scopes: Mapped[list[str] | None]
    predecessor_id: Mapped[str | None] = mapped_column(ForeignKey("keys.id"), unique=True)
    certificate: Mapped[str | None]
    digest: Mapped[bytes]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Member(Table):
    """What a person who signs in elsewhere may do, in a project or a whole organisation."""

    __tablename__ = "members"
    __table_args__ = (Index("ix_members_person", "issuer", "subject"),)
    id: Mapped[UUID] = _id()
    organisation_id: Mapped[UUID] = mapped_column(ForeignKey("organisations.id"), index=True)
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"))
    issuer: Mapped[str]
    subject: Mapped[str]
    name: Mapped[str]
    role: Mapped[str]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class Enrolment(Table):
    """A single-use token that admits one client to a project."""

    __tablename__ = "enrolments"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    digest: Mapped[bytes]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    client_id: Mapped[UUID | None] = mapped_column(ForeignKey("clients.id"))


class IdempotentAnswer(Table):
    """What a creating call answered, so that its repetition has one effect and one answer.

    The answer is sealed with a key that only the repeated request can derive: it may hold secrets.
    """

    __tablename__ = "idempotent_answers"
    caller: Mapped[str] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_digest: Mapped[bytes]
    answer: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(index=True)


# --- what --------------------------------------------------------------------------------------


class Object(Table):
    """A key of the object store that the service writes, and whether its bytes are still there.

    Claimed before the first byte is written. ``deletion_id`` names the deletion that takes it;
    ``deleted_at`` says that it is gone. Rows that name the key stay and point here.
    """

    __tablename__ = "objects"
    __table_args__ = (
        Index(
            "ix_objects_doomed",
            "deletion_id",
            postgresql_where=text("deletion_id IS NOT NULL AND deleted_at IS NULL"),
        ),
    )
    key: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"))
    size: Mapped[int]
    claimed_at: Mapped[datetime]
    deletion_id: Mapped[UUID | None]
    deleted_at: Mapped[datetime | None]


class Model(Table):
    """A registered neural network: its parameter space."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    space: Mapped[dict[str, Any]]
    space_digest: Mapped[str]
    elements: Mapped[int]
    created_at: Mapped[datetime]


class Run(Table):
    """One training campaign. Its row lock orders every transition of its rounds."""

    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("project_id", "name"),
        _one_of("state", [s.value for s in RunState]),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    model_id: Mapped[UUID] = mapped_column(ForeignKey("models.id"))
    cohort_id: Mapped[UUID | None] = mapped_column(ForeignKey("cohorts.id"))
    name: Mapped[str]
    settings: Mapped[dict[str, Any]]
    state: Mapped[str]
    reason: Mapped[str | None]
    evaluation_ends: Mapped[datetime | None]
    noise_commitment: Mapped[str | None]  # of the secret behind the noise of privacy.dp
    created_at: Mapped[datetime]


class Arm(Table):
    """One policy inside a run, with its own line of versions."""

    __tablename__ = "arms"
    __table_args__ = (UniqueConstraint("run_id", "name"),)
    id: Mapped[UUID] = _id()
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"))
    name: Mapped[str]
    created_at: Mapped[datetime]


class Version(Table):
    """One immutable set of shared parameters; ``arm_id`` is null for a model's initial weights."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("arm_id", "number"),
        Index(
            "uq_versions_initial", "model_id", unique=True, postgresql_where=text("arm_id IS NULL")
        ),
        CheckConstraint(
            "(delta_key IS NULL) = (delta_sha256 IS NULL) AND"
            " (delta_key IS NULL) = (delta_size IS NULL)",
            name="delta_whole",
        ),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    model_id: Mapped[UUID] = mapped_column(ForeignKey("models.id"))
    arm_id: Mapped[UUID | None] = mapped_column(ForeignKey("arms.id"))
    round_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("rounds.id", use_alter=True), unique=True
    )
    parent_id: Mapped[UUID | None] = mapped_column(ForeignKey("versions.id"))
    number: Mapped[int]
    object_key: Mapped[str] = mapped_column(ForeignKey("objects.key"), index=True)
    sha256: Mapped[str]
    size: Mapped[int]
    encoding: Mapped[str] = mapped_column(default="f32", server_default="f32")
    delta_key: Mapped[str | None] = mapped_column(ForeignKey("objects.key"), index=True)
    delta_sha256: Mapped[str | None]
    delta_size: Mapped[int | None]
    manifest_sha256: Mapped[str | None]
    code_version: Mapped[str]
    recomputable: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    created_at: Mapped[datetime]


# --- rounds ------------------------------------------------------------------------------------


class Round(Table):
    """One pass towards version ``number``; an abandoned one is tried again as a new attempt."""

    __tablename__ = "rounds"
    __table_args__ = (
        UniqueConstraint("arm_id", "number", "attempt"),
        _one_of("state", [s.value for s in RoundState]),
        Index(
            "uq_rounds_active",
            "arm_id",
            unique=True,
            postgresql_where=text("state IN ('selecting', 'collecting', 'aggregating')"),
        ),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"), index=True)
    arm_id: Mapped[UUID] = mapped_column(ForeignKey("arms.id"))
    base_version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    number: Mapped[int]
    attempt: Mapped[int]
    state: Mapped[str]
    reason: Mapped[str | None]
    selection_ends: Mapped[datetime]
    report_ends: Mapped[datetime]
    opened_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]


class Assignment(Table):
    """One client's place in a round, or in the evaluation or ablation of a version (``round_id``
    null).
    """

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("round_id", "client_id", "attempt"),
        Index(
            "uq_assignments_evaluation",
            "version_id",
            "client_id",
            unique=True,
            postgresql_where=text("kind = 'evaluate' AND rollout_id IS NULL"),
        ),
        Index(
            "uq_assignments_rollout",
            *("rollout_id", "client_id", "attempt"),
            unique=True,
            postgresql_where=text("rollout_id IS NOT NULL"),
        ),
        Index(
            "uq_assignments_ablation",
            "version_id",
            "client_id",
            "attempt",
            unique=True,
            postgresql_where=text("kind = 'ablate'"),
        ),
        CheckConstraint("(kind = 'train') = (round_id IS NOT NULL)", name="round_if_train"),
        _one_of("kind", ["train", "evaluate", "ablate"]),
        _one_of("state", [s.value for s in AssignmentState]),
        Index("ix_assignments_client_open", "client_id", "state"),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"))
    arm_id: Mapped[UUID] = mapped_column(ForeignKey("arms.id"))
    round_id: Mapped[UUID | None] = mapped_column(ForeignKey("rounds.id"))
    rollout_id: Mapped[UUID | None] = mapped_column(ForeignKey("rollouts.id"))
    client_id: Mapped[UUID] = mapped_column(ForeignKey("clients.id"))
    version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    mask_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("masks.id")
    )  # the mask the coordinator held when it assigned
    kind: Mapped[str]
    attempt: Mapped[int]
    state: Mapped[str]
    reason: Mapped[str | None]
    download_size: Mapped[int | None]  # bytes of the files that it was first told to fetch
    deadline: Mapped[datetime]
    created_at: Mapped[datetime]


class Transition(Table):
    """History: every change of state of a run, a round or an assignment, never updated."""

    __tablename__ = "transitions"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    subject_kind: Mapped[str]
    subject_id: Mapped[UUID] = mapped_column(index=True)
    from_state: Mapped[str | None]
    to_state: Mapped[str]
    reason: Mapped[str | None]
    actor: Mapped[str]
    created_at: Mapped[datetime]


class Upload(Table):
    """A file on its way in: an assignment's update or a model's initial weights."""

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("(assignment_id IS NULL) <> (model_id IS NULL)", name="one_purpose"),
        _one_of("state", ["reserved", "uploaded", "accepted", "rejected", "late"]),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    assignment_id: Mapped[UUID | None] = mapped_column(ForeignKey("assignments.id"), unique=True)
    model_id: Mapped[UUID | None] = mapped_column(ForeignKey("models.id"), index=True)
    staging_key: Mapped[str] = mapped_column(unique=True)
    size: Mapped[int]
    sha256: Mapped[str]
    md5: Mapped[str]
    part_size: Mapped[int | None]
    parts: Mapped[list[str] | None]
    multipart_id: Mapped[str | None] = mapped_column(index=True)
    state: Mapped[str]
    reason: Mapped[str | None]
    detail: Mapped[str | None]
    created_at: Mapped[datetime]
    completed_at: Mapped[datetime | None]


class MaskRecord(Table):
    """A mask a client has sent: ``number`` counts its masks in the arm from 1."""

    __tablename__ = "masks"
    __table_args__ = (UniqueConstraint("arm_id", "client_id", "number"),)
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    arm_id: Mapped[UUID] = mapped_column(ForeignKey("arms.id"))
    client_id: Mapped[UUID] = mapped_column(ForeignKey("clients.id"))
    number: Mapped[int]
    sha256: Mapped[str]
    object_key: Mapped[str] = mapped_column(ForeignKey("objects.key"), index=True)
    personal: Mapped[int]
    created_at: Mapped[datetime]


class Update(Table):
    """An accepted update, numbered 1..n in the order of acceptance.

    One that was withdrawn while its round gathered keeps its number, and does not count.
    """

    __tablename__ = "updates"
    __table_args__ = (
        UniqueConstraint("round_id", "number"),
        UniqueConstraint("round_id", "client_id"),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    round_id: Mapped[UUID] = mapped_column(ForeignKey("rounds.id"))
    assignment_id: Mapped[UUID] = mapped_column(ForeignKey("assignments.id"), unique=True)
    client_id: Mapped[UUID] = mapped_column(ForeignKey("clients.id"))
    mask_id: Mapped[UUID] = mapped_column(ForeignKey("masks.id"))
    number: Mapped[int]
    object_key: Mapped[str] = mapped_column(ForeignKey("objects.key"), index=True)
    sha256: Mapped[str]
    size: Mapped[int]
    examples: Mapped[int]
    change_norm: Mapped[float | None] = mapped_column(Double)  # where influence is bounded
    sketch: Mapped[bytes | None]  # of the change, while its round gathers
    created_at: Mapped[datetime]
    withdrawn_at: Mapped[datetime | None]


class PartialSum(Table):
    """The first groups of one shard of a gathering round, added up; ``digest`` says of what."""

    __tablename__ = "partial_sums"
    round_id: Mapped[UUID] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    groups: Mapped[int]
    digest: Mapped[str]
    object_key: Mapped[str]
    created_at: Mapped[datetime]


class ManifestRecord(Table):
    """What a round aggregates, frozen: canonical JSON and its digest, never updated."""

    __tablename__ = "manifests"
    round_id: Mapped[UUID] = mapped_column(ForeignKey("rounds.id"), primary_key=True)
    body: Mapped[str]
    sha256: Mapped[str]
    created_at: Mapped[datetime]


class EvaluationRecord(Table):
    """A client's scores of a version on its own held-out data."""

    __tablename__ = "evaluations"
    assignment_id: Mapped[UUID] = mapped_column(ForeignKey("assignments.id"), primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"), index=True)
    client_id: Mapped[UUID] = mapped_column(ForeignKey("clients.id"))
    version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    rollout_id: Mapped[UUID | None] = mapped_column(ForeignKey("rollouts.id"))
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class AblationRecord(Table):
    """What a client's personal part of a version is worth on its own held-out data."""

    __tablename__ = "ablations"
    __table_args__ = (Index("ix_ablations_client", "run_id", "client_id"),)
    assignment_id: Mapped[UUID] = mapped_column(ForeignKey("assignments.id"), primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    run_id: Mapped[UUID] = mapped_column(ForeignKey("runs.id"))
    client_id: Mapped[UUID] = mapped_column(ForeignKey("clients.id"))
    version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    report: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


# --- who gets which version --------------------------------------------------------------------


class Cohort(Table):
    """A named set of clients: a rule, and the salt of its hash."""

    __tablename__ = "cohorts"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    rule: Mapped[dict[str, Any]]
    salt: Mapped[str]
    created_at: Mapped[datetime]


class Channel(Table):
    """A named pointer to a version of a model: what clients serve."""

    __tablename__ = "channels"
    __table_args__ = (_one_of("name", ["stable", "pilot"]),)
    model_id: Mapped[UUID] = mapped_column(ForeignKey("models.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    previous_id: Mapped[UUID | None] = mapped_column(ForeignKey("versions.id"))
    cohort_id: Mapped[UUID | None] = mapped_column(ForeignKey("cohorts.id"))
    reason: Mapped[str]
    moved_at: Mapped[datetime]


class Rollout(Table):
    """A version on its way to everybody; at most one that has not ended moves a channel."""

    __tablename__ = "rollouts"
    __table_args__ = (
        UniqueConstraint("project_id", "name"),
        _one_of("state", [s.value for s in RolloutState]),
        Index(
            "uq_rollouts_active",
            "model_id",
            "channel",
            unique=True,
            postgresql_where=text(f"state IN ({_listed(sorted(ACTIVE_ROLLOUTS))})"),
        ),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    model_id: Mapped[UUID] = mapped_column(ForeignKey("models.id"))
    channel: Mapped[str]
    version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    old_version_id: Mapped[UUID] = mapped_column(ForeignKey("versions.id"))
    name: Mapped[str]
    settings: Mapped[dict[str, Any]]
    state: Mapped[str]
    reason: Mapped[str]
    stage: Mapped[int]
    stage_ends: Mapped[datetime]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]


class RolloutClient(Table):
    """The stage in which a rollout reaches a client; null: it is of the control group."""

    __tablename__ = "rollout_clients"
    rollout_id: Mapped[UUID] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    client_id: Mapped[UUID] = mapped_column(ForeignKey("clients.id"), primary_key=True)
    stage: Mapped[int | None]


class RolloutJudgement(Table):
    """What the gates said of a stage, with their numbers, never updated."""

    __tablename__ = "rollout_judgements"
    rollout_id: Mapped[UUID] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    stage: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    verdict: Mapped[str]
    gates: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


# --- work --------------------------------------------------------------------------------------


class Job(Table):
    """Work that is due. The row is the job; a Celery message is only the doorbell."""

    __tablename__ = "jobs"
    __table_args__ = (
        _one_of("state", ["due", "leased", "done", "failed"]),
        UniqueConstraint("kind", "subject_id", "part"),
        Index("ix_jobs_open", "run_after", postgresql_where=text("state IN ('due', 'leased')")),
    )
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str]
    subject_id: Mapped[UUID]
    part: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(default="due")
    run_after: Mapped[datetime]
    attempts: Mapped[int] = mapped_column(default=0)
    lease_token: Mapped[UUID | None]
    lease_epoch: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None]
    error: Mapped[str | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    rung_at: Mapped[datetime | None]


# --- ledger ------------------------------------------------------------------------------------


class Entry(Table):
    """One fact of the ledger, written in the transaction of the change, never updated."""

    __tablename__ = "ledger_entries"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    project_id: Mapped[UUID | None] = mapped_column(ForeignKey("projects.id"), index=True)
    at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    body: Mapped[dict[str, Any]]


class Seal(Table):
    """An entry's place in the tamper-evident tree, with the subtrees that end there: 2, 4, 8 …"""

    __tablename__ = "ledger_seals"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    entry_id: Mapped[int] = mapped_column(ForeignKey("ledger_entries.id"), unique=True)
    leaf: Mapped[bytes]
    subtrees: Mapped[bytes]


class CheckpointRecord(Table):
    """A signed head of the tree, and the frontier from which the next one is computed."""

    __tablename__ = "ledger_checkpoints"
    size: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    frontier: Mapped[list[str]]
    text: Mapped[str]
    created_at: Mapped[datetime]


# --- webhooks ----------------------------------------------------------------------------------


class Webhook(Table):
    """An address that is told of the ledger's new entries."""

    __tablename__ = "webhooks"
    __table_args__ = (_one_of("state", ["active", "disabled"]),)
    id: Mapped[UUID] = _id()
    project_id: Mapped[UUID] = mapped_column(ForeignKey("projects.id"), index=True)
    url: Mapped[str]
    events: Mapped[list[str]]
    state: Mapped[str]
    seen: Mapped[int]
    generation: Mapped[int]
    rotated_at: Mapped[datetime | None]
    created_at: Mapped[datetime]


class Delivery(Table):
    """One entry on its way to one webhook."""

    __tablename__ = "deliveries"
    __table_args__ = (
        _one_of("state", ["waiting", "delivered", "dead"]),
        UniqueConstraint("webhook_id", "seq"),
        Index("ix_deliveries_due", "due_at", postgresql_where=text("state = 'waiting'")),
    )
    id: Mapped[UUID] = _id()
    webhook_id: Mapped[UUID] = mapped_column(ForeignKey("webhooks.id"))
    seq: Mapped[int] = mapped_column(ForeignKey("ledger_seals.seq"))
    state: Mapped[str]
    attempts: Mapped[int]
    status: Mapped[int | None]
    error: Mapped[str | None]
    due_at: Mapped[datetime]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
