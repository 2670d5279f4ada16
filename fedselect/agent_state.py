"""The agent's folder: what a client keeps between two steps, safe against ``kill -9``.

Owns names and order of writing of every file in it (their form is ``agentdocs``)::

    lock                                  held by the one agent that works here
    registration.json                     the Idempotency-Key of a registration under way
    credentials.json                      server, client, name and key (0600)
    checkpoint.txt                        the last signed head of the ledger that was proven to us
    ledger-key.txt                        the verifier key that it must be signed with
    space.json                            the model's parameter space, for whoever serves it
    evidence/                             heads that cannot both be true, if we were ever shown any
    versions/<sha256>                     version files in use
    arms/<arm>/arm.json                   the truth about an arm: committed, tentative, counters
    arms/<arm>/run.json                   its run and settings, for the site's own people
    arms/<arm>/<assignment>.safetensors   personal states: the last few that counted, those of
                                          pinned versions, and the tentative one
    arms/<arm>/<assignment>.update        the update of the tentative one, until it is settled

Every change of an arm is one atomic replacement of its ``arm.json``, after the files that it names
are on the disk; files that it does not name are leftovers and are swept. Must not train or talk to
anyone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

from fedselect.agentdocs import (
    CREDENTIALS,
    DIGEST,
    RUN,
    SPACE,
    Committed,
    Credentials,
    Delivery,
    Document,
    Registering,
    StoredFile,
    Tentative,
    corrupt,
    read_arm,
    read_credentials,
    read_document,
    read_run,
    read_version,
)
from fedselect.checkindocs import RunBrief
from fedselect.errors import FedSelectError
from fedselect.personal import PersonalState, Pieces, sync_folder, write_atomically
from fedselect.sending import Source, announce
from fedselect.space import ParameterSpace
from fedselect.uploads import UploadReserve

REGISTRATION = "registration.json"
CHECKPOINT, LEDGER_KEY = "checkpoint.txt", "ledger-key.txt"
Meter = Callable[[], tuple[int, int]]
REMEMBERED = 32  # digests of received versions, so that a repeated download counts once


class AgentFolder:
    """The folder of one agent, created with mode 0700 and locked for this process.

    Raises:
        FedSelectError: ``state_locked`` if another agent works in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)  # it may have been there with another mode
        self._lock = _lock(path / "lock")
        self._head: str | None = None
        self.meter: Meter = lambda: (0, 0)
        self._versions, self._arms = path / "versions", path / "arms"
        for folder in (self._versions, self._arms):
            _make(folder)
        for folder in (path, self._versions):
            _remove(folder, lambda name: name.startswith("."))  # torn writes
        if (path / CREDENTIALS).exists():
            (path / REGISTRATION).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another agent work here."""
        os.close(self._lock)

    # --- identity ------------------------------------------------------------------------------

    def credentials(self) -> Credentials | None:
        """Who we are, None before the registration."""
        return read_credentials(self.path)

    def registering(self, server: str, *, name: str, token: str) -> Registering:
        """The registration to make or to repeat; it is on the disk before this returns."""
        path = self.path / REGISTRATION
        digest = hashlib.sha256(token.encode()).hexdigest()
        begun = read_document(path, Registering)
        if begun and (begun.server, begun.name, begun.token_sha256) == (server, name, digest):
            return begun
        fresh = Registering(
            server=server, name=name, token_sha256=digest, idempotency_key=uuid4().hex
        )
        _write(path, fresh)
        return fresh

    def registered(self, credentials: Credentials) -> None:
        """Keep the credentials; the registration is over."""
        _write(self.path / CREDENTIALS, credentials)
        (self.path / REGISTRATION).unlink(missing_ok=True)

    # --- the ledger ----------------------------------------------------------------------------

    def pinned(self) -> str | None:
        """The verifier key of the ledger that is trusted here."""
        return _text(self.path / LEDGER_KEY)

    def pin(self, key: str) -> None:
        """Trust this key from now on."""
        write_atomically(self.path / LEDGER_KEY, key.encode())

    def head(self) -> str | None:
        """The last ledger head that was proven: what it signs cannot be denied to us later."""
        if self._head is None:
            self._head = _text(self.path / CHECKPOINT)
        return self._head

    def keep_head(self, text: str) -> None:
        """Keep a ledger head that was proven."""
        write_atomically(self.path / CHECKPOINT, text.encode())
        self._head = text

    def keep_evidence(self, kept: str, shown: str, *, why: str) -> str:
        """Keep two heads that cannot both be true, for people; returns the folder."""
        name = hashlib.sha256(f"{kept}\0{shown}".encode()).hexdigest()[:16]
        folder = self.path / "evidence" / name
        _make(folder.parent)
        _make(folder)
        for file, text in (("kept.txt", kept), ("shown.txt", shown), ("why.txt", why + "\n")):
            write_atomically(folder / file, text.encode())
        return str(folder)

    # --- version files -------------------------------------------------------------------------

    def version(self, sha256: str) -> bytes | None:
        """A kept version file, None if it has to be fetched."""
        return read_version(self.path, sha256)

    def versions(self) -> list[str]:
        """Digests of the version files that are here."""
        return sorted(path.name for path in self._versions.iterdir() if DIGEST.fullmatch(path.name))

    def keep_version(self, data: bytes, sha256: str) -> None:
        """Keep a version file, whose digest was checked, for the next use; if it is lost or torn,
        it is fetched again.
        """
        write_atomically(self._versions / sha256, data, durable=False)

    def bases(self, run: UUID) -> set[str]:
        """Digests of the versions that the work in a run's arms was trained from, what counts and
        what is tentative.
        """
        mine = [path for path in self._arms.iterdir() if (of := read_run(path)) and of.id == run]
        found = [work for path in mine for work in read_arm(path).work()]
        return {work.base for work in found if work.base}

    def forget_versions(self, *, but: set[str]) -> None:
        """Remove the version files that are not in use, so that they never pile up."""
        _remove(self._versions, lambda name: name not in but)

    def keep_space(self, space: ParameterSpace) -> None:
        """Keep the model's parameter space, which gives a state's values their names."""
        write_atomically(self.path / SPACE, json.dumps(space.to_json()).encode(), durable=False)

    # --- arms ----------------------------------------------------------------------------------

    def keep_parts(self, versions: Mapping[UUID, set[int]]) -> None:
        """Keep the personal states that go with these versions, by arm and number, if they are
        still here; those of others need not stay.
        """
        for path in sorted(self._arms.iterdir()):
            Arm(path, self.meter).pin(versions.get(UUID(path.name), set()))

    def arm(self, arm_id: UUID) -> Arm:
        """The state in one arm."""
        path = self._arms / str(arm_id)
        _make(path)
        return Arm(path, self.meter)

    def pending(self) -> list[tuple[Arm, Tentative]]:
        """The tentative work that waits for its outcome, with its arm; at most one an arm."""
        arms = [Arm(path, self.meter) for path in sorted(self._arms.iterdir())]
        return [(arm, arm.record.tentative) for arm in arms if arm.record.tentative is not None]


class Arm:
    """One arm's state. ``record`` is what ``arm.json`` says; every change replaces both.

    ``meter`` gives the bytes of control traffic, sent and received, since it was last asked.
    """

    def __init__(self, path: Path, meter: Meter) -> None:
        self._path, self._meter = path, meter
        self.id = UUID(path.name)
        self.record = read_arm(path)
        self._sweep()

    def committed(self, space: ParameterSpace) -> PersonalState | None:
        """The personal state that counts, None for a client that never took part.

        Raises:
            FedSelectError: ``state_corrupt`` or ``state_mismatch``.
        """
        return self._state(self.record.committed, space)

    def counted(self, number: int, space: ParameterSpace) -> PersonalState | None:
        """The personal state that goes with a version of the arm, None for a client that had none
        then; which one it is, :meth:`ArmRecord.at` says.

        Raises:
            FedSelectError: ``state_corrupt`` or ``state_mismatch``.
        """
        return self._state(self.record.at(number), space)

    def _state(self, kept: Committed | None, space: ParameterSpace) -> PersonalState | None:
        return PersonalState.from_bytes(self._load(kept.state), space) if kept else None

    def pin(self, numbers: set[int]) -> None:
        """Versions of the arm whose personal states are to be kept."""
        pinned = tuple(sorted(numbers))
        if pinned != self.record.pinned:
            self._change(pinned=pinned)

    def update(self, tentative: Tentative) -> tuple[Source, UploadReserve]:
        """The update file of the tentative work, left on the disk, and what to announce of it.

        One reading finds what the announcement needs and that these are the bytes of before.

        Raises:
            FedSelectError: ``state_corrupt``.
        """
        path = self._path / tentative.update.name
        if not path.exists() or path.stat().st_size != tentative.update.size:
            raise corrupt(path)
        file = Source(tentative.update.size, partial(_read_range, path))
        found = announce(file)
        if found.sha256 != tentative.update.sha256:
            raise corrupt(path)
        return file, found

    def received(self, sha256: str, size: int, *, delta: bool = False) -> None:
        """Count a version or delta file; called before what it gives is kept, so that no crash
        loses or doubles it.
        """
        before = self.record
        if sha256 not in before.received:
            self._change(
                bytes_received=before.bytes_received + size,
                delta_bytes_received=before.delta_bytes_received + (size if delta else 0),
                received=(*before.received, sha256)[-REMEMBERED:],
            )

    def keep_run(self, run: RunBrief) -> None:
        """Keep what run this is; if it is lost, the next assignment says it again."""
        text, path = run.model_dump_json().encode(), self._path / RUN
        if not path.exists() or path.read_bytes() != text:
            write_atomically(path, text, durable=False)

    def tally(self) -> None:
        """Count the control traffic up to now."""
        self._change()

    def hold(self, delivery: Delivery, *, state: Pieces, update: bytes) -> Tentative:
        """Keep new work as tentative: the state that would follow and the update to send."""
        tentative = Tentative(
            **dict(delivery),
            state=self._save(f"{delivery.assignment}.safetensors", *state),
            update=self._save(f"{delivery.assignment}.update", update),
        )
        self._change(tentative=tentative)
        return tentative

    def sent(self, tentative: Tentative, upload: UUID) -> Tentative:
        """The update's file is in the object store; its bytes are counted once."""
        size = 0 if tentative.counted else tentative.update.size
        after = tentative.model_copy(update={"upload": upload, "counted": True})
        self._change(tentative=after, bytes_sent=self.record.bytes_sent + size)
        return after

    def unsent(self, tentative: Tentative) -> None:
        """The upload was not taken: the file has to be announced and sent again."""
        if tentative.upload is not None:
            self._change(tentative=tentative.model_copy(update={"upload": None}))

    def commit(self, tentative: Tentative) -> None:
        """The tentative work counts: one replacement of ``arm.json`` promotes it."""
        committed = Committed(
            assignment=tentative.assignment,
            round=tentative.round,
            state=tentative.state,
            base=tentative.base,
        )
        after = self.record.followed_by(committed)
        self._change(
            committed=committed,
            earlier=after.earlier,
            first=after.first,
            tentative=None,
            participations=self.record.participations + 1,
        )
        self._sweep()

    def discard(self) -> None:
        """The tentative work counts for nothing; the committed state is as it was."""
        self._change(tentative=None)
        self._sweep()

    def _change(self, **changes: object) -> None:
        sent, received = self._meter()
        changes["control_sent"] = self.record.control_sent + sent
        changes["control_received"] = self.record.control_received + received
        record = self.record.model_copy(update=changes)
        _write(self._path / "arm.json", record)
        self.record = record

    def _save(self, name: str, *pieces: bytes | memoryview) -> StoredFile:
        write_atomically(self._path / name, *pieces)
        return StoredFile.of(name, *pieces)

    def _load(self, file: StoredFile) -> bytes:
        path = self._path / file.name
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise corrupt(path)
        return data

    def _sweep(self) -> None:
        keep = self.record.files() | {"arm.json", RUN}
        _remove(self._path, lambda name: name not in keep)


def _make(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def _lock(path: Path) -> int:
    # The kernel drops the lock with the process, however that ends.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
    else:
        return descriptor
    raise FedSelectError(
        f"another agent works in {path.parent}; give each agent its own --state folder",
        code="state_locked",
    )


def _remove(folder: Path, unwanted: Callable[[str], bool]) -> None:
    for path in folder.iterdir():
        if path.is_file() and unwanted(path.name):
            path.unlink()


def _read_range(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(length)


def _text(path: Path) -> str | None:
    return path.read_text("utf-8") if path.exists() else None


def _write(path: Path, document: Document) -> None:
    write_atomically(path, document.model_dump_json(indent=1).encode())
