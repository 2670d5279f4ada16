"""The documents of the HTTP interface that agents and integrators see.

Owns their shape and limits, for the coordinator and the client SDK alike. Unknown fields are
refused in requests and ignored in answers. Must not know HTTP, rows or storage.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
)

from fedselect import encryption
from fedselect.deltas import Encoding
from fedselect.lifecycle import AssignmentState, RoundState, RunState
from fedselect.policies import Policy, RunSettings
from fedselect.scalars import Whole

MAX_UPLOAD = 5 * 1024**3  # bytes of the largest file
MULTIPART_FROM = 16 * 1024**2  # bytes from which on a file is sent in parts
PART_SIZE = 8 * 1024**2  # bytes of a part; S3 wants at least 5 MiB of all but the last
MOST_HELD = 64  # version files that a check-in may name
MAX_PARTS = 1000  # of one file; one list call names them all
Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", min_length=1, max_length=64)
]
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$", max_length=64)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Md5 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
# Tabs and line breaks are fine; no other control character can be kept and shown.
Reason = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f]*$")]
TENSOR = {"name": "head.weight", "shape": [6, 128], "kind": "weight", "role": "selectable"}


class Request(BaseModel):
    """A request body: unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(BaseModel):
    """An answer: fields may be added later, so readers ignore what they do not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


# --- clients -----------------------------------------------------------------------------------


class EnrolmentCreate(Request):
    """Ask for single-use enrolment tokens."""

    count: Whole = Field(1, ge=1, le=100, description="Number of tokens.", examples=[10])
    expires_in: Whole = Field(3600, ge=1, le=30 * 86_400, description="Lifetime in seconds.")


class Enrolments(Answer):
    """Enrolment tokens; each is shown once and admits one client."""

    tokens: list[str] = Field(repr=False)
    expires_at: datetime


class Registration(Request):
    """A site that joins, with its enrolment token."""

    token: str = Field(max_length=200, repr=False, description="A single-use enrolment token.")
    name: Name = Field(examples=["ward-7"])
    tags: list[Tag] = Field(default=[], max_length=20)


class ClientInfo(Answer):
    """A registered client."""

    id: UUID
    name: str
    state: Literal["active", "suspended", "revoked"]
    tags: list[str]
    created_at: datetime
    last_seen_at: datetime | None = None


class Strike(Answer):
    """A refused update that counts against a client."""

    round: int = Field(description="Number of the round.")
    reason: str = Field(examples=["values_not_finite"])
    at: datetime


class RunConduct(Answer):
    """A client's strikes in a run that counts them."""

    run_id: UUID
    run: str = Field(description="The run's name.")
    count: int = Field(description="Strikes that count now.")
    strikes: list[Strike] = Field(description="These, the oldest first.")
    limit: int = Field(description="So many suspend the client.")
    window: float = Field(description="Seconds for which a strike counts.")


class ClientConduct(Answer):
    """Where a client stands in all runs that count strikes, the oldest run first."""

    client_id: UUID
    state: Literal["active", "suspended", "revoked"]
    forgiven_at: datetime | None = Field(None, description="Strikes before it do not count.")
    runs: list[RunConduct]


class Registered(Answer):
    """The new client and its key, which is shown this one time."""

    client: ClientInfo
    key: str = Field(repr=False)
    ledger_key: str | None = Field(None, description="Verifier key of the ledger, to be kept.")


# --- models and versions -----------------------------------------------------------------------


class ModelCreate(Request):
    """Register a model by its parameter space; its weights follow by upload."""

    name: Name = Field(examples=["watch-cnn"])
    space: dict[str, Any] = Field(
        description="The parameter space, see docs/ARCHITECTURE.md.",
        examples=[{"tensors": [TENSOR]}],
    )


class VersionInfo(Answer):
    """One immutable set of shared parameters."""

    id: UUID
    model_id: UUID
    arm_id: UUID | None = Field(description="None for a model's registered initial weights.")
    number: int
    sha256: str = Field(description="Digest of the version file.")
    size: int = Field(description="Bytes of the version file.")
    encoding: Encoding = Field(
        "f32", description="How the updates behind it and its delta are written."
    )
    delta_sha256: str | None = Field(
        None, description="Digest of the file that leads from its parent to it, if there is one."
    )
    delta_size: int | None = Field(None, description="Bytes of that file.")
    parent_id: UUID | None
    manifest_sha256: str | None
    code_version: str
    recomputable: bool = Field(
        True, description="False once files behind it were deleted; see docs/OPERATIONS.md."
    )
    created_at: datetime


class ModelInfo(Answer):
    """A registered model."""

    id: UUID
    name: str
    space_digest: str
    elements: int
    initial_version: VersionInfo | None
    created_at: datetime


class Download(Answer):
    """A short-lived signed address to fetch a file from the object store."""

    url: str = Field(repr=False)
    sha256: str
    size: int
    expires_at: datetime

    def opened(self, data: bytes) -> bytes:
        """The file's own bytes, of those that were fetched."""
        return data


class FileDownload(Download):
    """The same of a file that may be encrypted in the store (``fedselect-encrypted/1``)."""

    file_keys: dict[str, str] = Field(
        {},
        repr=False,
        description="What opens this file and no other: file keys (hex) by the id of the key above "
        "them; none: it is not encrypted. `size` is of what is fetched, `sha256` of what comes "
        "out.",
    )

    def opened(self, data: bytes) -> bytes:
        """The file's own bytes, of those that were fetched.

        Raises:
            DecryptionError: these are not what was stored.
        """
        if not self.file_keys:
            return data
        keys = {name: bytes.fromhex(key) for name, key in self.file_keys.items()}
        return encryption.decrypt(data, keys)


# --- files in parts ----------------------------------------------------------------------------


def part_sizes(size: int) -> list[int]:
    """Bytes of every part of a file of ``size`` bytes: all equal but for the last, at most 1,000.

    Raises:
        ValueError: a file has at least one byte.
    """
    if size < 1:
        raise ValueError(f"{size} bytes cannot be sent in parts")
    part = max(PART_SIZE, -(-size // MAX_PARTS))
    return [min(part, size - start) for start in range(0, size, part)]


def in_parts(size: int) -> bool:
    """Whether a file of ``size`` bytes is sent in parts."""
    return size >= MULTIPART_FROM


# --- runs and rounds ---------------------------------------------------------------------------


class RunCreate(Request):
    """A training campaign on a model, from its initial weights."""

    name: Name = Field(examples=["shoulder-2026"])
    model_id: UUID
    settings: RunSettings = RunSettings()
    cohort_id: UUID | None = Field(
        None, description="Its members alone get places and evaluate; null: all clients."
    )


class ArmInfo(Answer):
    """One policy of a run, with its own line of versions."""

    id: UUID
    name: str
    policy: Policy
    published: int = Field(description="Rounds published in this arm so far.")


PRIVACY_CLAIM = (
    "Whoever knows all published versions of the run learns within (ε, δ) the same of everything "
    "that one client has sent in it, values and masks together, as if it had sent zeros. Accounted "
    "without amplification by sampling, as if every client took part in every round. Not covered: "
    "that a client takes part; what the coordinator holds itself (updates, masks, metrics, "
    "reports, evaluations); other runs with the same clients, whose budgets add up."
)


class PrivacyAccount(Answer):
    """The (ε, δ) of a run with differential privacy, and how large its noise is."""

    budget: float = Field(description="ε at which the run stops.")
    delta: float
    clip: float
    noise: float = Field(description="The noise multiplier as it is accounted.")
    rounds: int = Field(description="That the budget allows, at most those of the run.")
    epsilon: float = Field(description="Of so many rounds.")
    spent: float = Field(description="ε of the rounds published so far.")
    noise_share: float = Field(
        description="Length of all noise against the farthest that clients could move the model "
        "together; above 1 a run is refused."
    )
    clients_needed: int = Field(description="The least goal at which it would not be.")
    accuracy_cost: float | None = Field(
        None, description="Points that noise alone cost in a dry run; null: not measured."
    )
    claim: str = PRIVACY_CLAIM


class RunInfo(Answer):
    """A run and how far it is."""

    id: UUID
    name: str
    model_id: UUID
    cohort_id: UUID | None = None
    arm_id: UUID = Field(description="The first arm.")
    arms: list[ArmInfo] = []
    state: RunState
    reason: str | None
    settings: RunSettings
    warnings: list[str]
    privacy: PrivacyAccount | None = Field(
        None, description="Of a run with differential privacy: what is spent, and promised."
    )
    published: int = Field(description="Rounds published so far, in every arm.")
    created_at: datetime


class AssignmentInfo(Answer):
    """One client's place in a round, as an administrator sees it."""

    id: UUID
    client_id: UUID
    client_name: str
    attempt: int
    state: AssignmentState
    reason: str | None
    assigned_at: datetime
    upload_id: UUID | None = Field(description="Of its newest file; `getUpload` tells its state.")
    detail: str | None = Field(description="Why that file was refused, in words.")
    update_size: int | None = Field(None, description="Bytes of that file, if it was sent.")
    download_size: int | None = Field(
        None, description="Bytes of the version or delta files that it was told to fetch."
    )


class RoundInfo(Answer):
    """One pass: assignments, updates, one new version or none."""

    id: UUID
    run_id: UUID
    arm_id: UUID | None = None
    number: int
    attempt: int
    state: RoundState
    reason: str | None
    base_version_id: UUID
    version_id: UUID | None
    manifest_sha256: str | None
    opened_at: datetime
    closed_at: datetime | None


class RoundDetail(RoundInfo):
    """A round with its assignments."""

    assignments: list[AssignmentInfo]


# The canonical sum of DESIGN §4. A manifest records both, so that anyone can add in the same order.


class JobInfo(Answer):
    """A piece of the coordinator's own work."""

    id: UUID
    kind: str
    subject_id: UUID
    part: int
    state: str
    attempts: int
    error: str | None
    run_after: datetime
    lease_until: datetime | None
    created_at: datetime
    finished_at: datetime | None


# --- operations and problems -------------------------------------------------------------------


class Health(Answer):
    """Whether the coordinator is there, and what behind it is not."""

    status: Literal["ok", "away"]
    version: str
    away: dict[str, str] = {}


class Problem(Answer):
    """An error as RFC 9457 describes it; ``code`` is stable, ``detail`` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    errors: list[dict[str, Any]] | None = None
