"""The documents in an agent's folder, and reading them without touching anything.

Owns their shape. What is written when is ``agent_state``; whoever serves a model only reads.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal, Self, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedselect.checkindocs import RunBrief
from fedselect.errors import FedSelectError

CREDENTIALS, SPACE, RUN = "credentials.json", "space.json", "run.json"
HISTORY = 3  # committed states of an arm that are kept behind the present one
DIGEST = re.compile("[0-9a-f]{64}")


class Document(BaseModel):
    """A file of the folder: an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


D = TypeVar("D", bound=Document)


class Credentials(Document):
    """Who this client is at which coordinator."""

    server: str
    client_id: UUID
    name: str
    key: str = Field(repr=False)


class Registering(Document):
    """A registration under way: the same call must be repeated until it is answered."""

    server: str
    name: str
    token_sha256: str
    idempotency_key: str


class StoredFile(Document):
    """A file beside ``arm.json``."""

    name: str
    sha256: str
    size: int

    @classmethod
    def of(cls, name: str, *pieces: bytes | memoryview) -> Self:
        """What is to be known of a file that holds these pieces, one after the other."""
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        size = sum(memoryview(piece).nbytes for piece in pieces)
        return cls(name=name, sha256=digest.hexdigest(), size=size)


class Committed(Document):
    """The personal state that counts, and the assignment that it came from.

    ``base`` is the SHA-256 of the version that it was trained from; an earlier release did not say.
    """

    assignment: UUID
    round: int
    state: StoredFile
    base: str | None = None


class Delivery(Document):
    """What an update is for, and the mask that it counts under."""

    assignment: UUID
    round: int
    mask_version: int
    mask_sha256: str
    base: str | None = None


class Tentative(Delivery):
    """Work that counts once its update is accepted and its round published.

    ``upload`` is set while a sent file waits to be completed; ``counted`` says that its bytes are
    in ``bytes_sent``, whatever happens to that upload.
    """

    state: StoredFile
    update: StoredFile
    upload: UUID | None = None
    counted: bool = False


class ArmRecord(Document):
    """Where this client stands in one arm.

    ``bytes_sent`` are of update files, ``bytes_received`` of version and delta files together.
    ``control_sent`` and ``control_received`` are what else was exchanged; of a process that was
    killed, what it exchanged after its last change here is not known. ``earlier`` are states that
    counted before ``committed``, newest first; ``first`` is the round of the very first one, which
    an earlier release did not note; ``pinned`` are numbers of versions that the coordinator may say
    are to be served.
    """

    format: Literal["fedselect-arm/1"] = "fedselect-arm/1"
    participations: int = 0
    committed: Committed | None = None
    tentative: Tentative | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    delta_bytes_received: int = 0
    control_sent: int = 0
    control_received: int = 0
    received: tuple[str, ...] = ()
    earlier: tuple[Committed, ...] = ()
    first: int | None = None
    pinned: tuple[int, ...] = ()

    def at(self, number: int) -> Committed | None:
        """What counted when version ``number`` was published: the last of this client's own rounds
        up to it, None if it had taken part in none by then. If that one is not kept any more it is
        an earlier one, or else the oldest that is.
        """
        kept = self._kept()
        if not kept or number < (self.first or 1):
            return None
        return next((each for each in kept if each.round <= number), kept[-1])

    def followed_by(self, committed: Committed) -> ArmRecord:
        """The same with new work that counts. Of what counted before, the last few stay, and what
        belongs to pinned versions.
        """
        before, first = self._kept(), self.first
        if self.participations == 0:
            first = committed.round
        changes = {"committed": committed, "earlier": before, "first": first}
        after = self.model_copy(update=changes)
        needed = [after.at(number) for number in self.pinned]
        earlier = tuple(e for k, e in enumerate(before) if k < HISTORY or e in needed)
        return after.model_copy(update={"earlier": earlier})

    def _kept(self) -> tuple[Committed, ...]:
        return (self.committed, *self.earlier) if self.committed else ()

    def work(self) -> list[Committed | Tentative]:
        """What was trained here: what counts, and what is tentative."""
        return [each for each in (self.committed, self.tentative) if each is not None]

    def files(self) -> set[str]:
        """Names of the files that must stay."""
        named = [each.state for each in self._kept()]
        if self.tentative:
            named += [self.tentative.state, self.tentative.update]
        return {file.name for file in named}


# --- reading -----------------------------------------------------------------------------------


def read_arm(path: Path) -> ArmRecord:
    """What an arm's folder says, read without touching anything; see :class:`AgentFolder`."""
    return read_document(path / "arm.json", ArmRecord) or ArmRecord()


def read_run(path: Path) -> RunBrief | None:
    """What run an arm's folder says that it is of, if it does."""
    try:
        return RunBrief.model_validate_json((path / RUN).read_bytes())
    except (OSError, ValueError):
        return None


def read_credentials(folder: Path) -> Credentials | None:
    """Who an agent's folder belongs to, read without touching anything."""
    return read_document(folder / CREDENTIALS, Credentials)


def read_version(folder: Path, sha256: str) -> bytes | None:
    """A version file in an agent's folder; None if it is not there, or damaged."""
    if not DIGEST.fullmatch(sha256):  # the service chose it, and it names a file
        return None
    path = folder / "versions" / sha256
    data = path.read_bytes() if path.exists() else b""
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def corrupt(path: Path) -> FedSelectError:
    """The error of a file that is not as it was written."""
    return FedSelectError(
        f"{path} is not as it was written; restore the folder from a backup, or start again with a "
        "new state folder and a new enrolment",
        code="state_corrupt",
    )


def read_document(path: Path, form: type[D]) -> D | None:
    """A document of the folder, None if there is none."""
    if not path.exists():
        return None
    try:
        return form.model_validate_json(path.read_bytes())
    except ValidationError:
        text = f"{path} cannot be read; restore it from a backup or use a new state folder"
    # Raised out here, so that no exception drags the content, maybe a key, along.
    raise FedSelectError(text, code="state_corrupt")
