"""A client's personalized model for serving, read from the folder of its agent.

Owns reading: nothing is locked or written, so the agent may run meanwhile. What it last committed
counts, never what is tentative. Must not know torch: the caller's model loads the tensors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from fedselect.agentdocs import (
    SPACE,
    ArmRecord,
    read_arm,
    read_credentials,
    read_run,
    read_version,
)
from fedselect.checkindocs import RunBrief
from fedselect.errors import FedSelectError
from fedselect.exporting import Tensors, named
from fedselect.personal import PersonalState
from fedselect.shelf import Pair, read_file, read_shown
from fedselect.space import ParameterSpace
from fedselect.wire import decode_version

TRIES = 3  # the agent may commit, and sweep what we were about to read


@dataclass(frozen=True)
class Personalized:
    """A personalized model: its tensors by name, in their shapes, and where they come from.

    ``model.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=False)``
    """

    tensors: Tensors
    arm: UUID
    round: int
    participations: int
    channel: str | None = None  # that says so; None: it is what was last trained, or a given file
    version: str | None = None  # SHA-256 of the version file in it


@dataclass(frozen=True)
class Kept:
    """What a client last committed in an arm, and what its folder says of it.

    ``base`` are the bytes of the version file that it was trained from. It, ``run`` and ``client``
    are None where an agent of an earlier release did not keep them.
    """

    arm: UUID
    round: int
    space: ParameterSpace
    state: PersonalState
    base: bytes | None
    run: RunBrief | None
    client: str | None


def load_kept(folder: str | Path, *, arm: UUID | None = None) -> Kept:
    """The committed state in the agent's ``folder``; ``arm`` says which of several arms.

    Raises:
        FedSelectError: ``state_missing``, ``state_ambiguous`` (name the arm), ``state_corrupt``.
    """
    path = Path(folder)
    space = _space(path)
    for _ in range(TRIES):
        chosen, record = _choose(path, arm)
        place, committed = path / "arms" / str(chosen), record.committed
        state = _state(place, record, space)
        if state is not None and committed is not None:
            known = read_credentials(path)
            return Kept(
                chosen,
                committed.round,
                space,
                state,
                read_version(path, committed.base) if committed.base else None,
                read_run(place),
                known.name if known else None,
            )
    raise FedSelectError(f"the state in {path} is damaged", code="state_corrupt")


def load_personalized(
    folder: str | Path, *, arm: UUID | None = None, version: bytes | None = None
) -> Personalized:
    """The personalized model of the agent's ``folder``.

    What the client's channel says: a version with the personal part that goes with it, both as the
    agent has kept them. Without a channel, or with ``arm``, which says which of several arms, it is
    as last trained and committed (*post*); with the bytes of a ``version`` file, that version with
    the client's present personal part merged in (*pre*).

    Raises:
        FedSelectError: ``state_missing``, ``state_ambiguous`` (name the arm), ``state_corrupt``.
        WireError: the version belongs to another model.
    """
    if arm is None and version is None:
        served = _served(Path(folder))
        if served is not None:
            return served
    kept = load_kept(folder, arm=arm)
    space, state = kept.space, kept.state
    values = state.theta if state.own is None else state.own
    if version is not None:
        base = decode_version(version, space_digest=space.digest, dim=space.dim)
        values = state.personalized(base)
    tensors = named(values, space, state.buffers)
    return Personalized(tensors, kept.arm, kept.round, state.participations)


def _served(path: Path) -> Personalized | None:
    """What the channel says, None if there is none."""
    for _ in range(TRIES):
        pairs = read_shown(path).pairs
        if not pairs:
            return None
        pair = pairs[0]
        version, state = read_file(path, pair.version), read_file(path, pair.state)
        if version is not None and state is not None:
            return _merged(pair, version, state, _space(path))
    raise FedSelectError(f"what is served from {path} is damaged", code="state_corrupt")


def _merged(pair: Pair, version: bytes, state: bytes, space: ParameterSpace) -> Personalized:
    own = PersonalState.from_bytes(state, space)
    base = decode_version(version, space_digest=space.digest, dim=space.dim)
    tensors = named(own.personalized(base), space, own.buffers)
    place = (pair.channel, pair.version.sha256)
    return Personalized(tensors, pair.arm, pair.round, pair.participations, *place)


def _space(path: Path) -> ParameterSpace:
    try:
        return ParameterSpace.from_json(json.loads((path / SPACE).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise FedSelectError(
            f"{path} has no {SPACE}: it is no agent's folder, or its agent is older than this "
            "version and has not been started since",
            code="state_missing",
        ) from error


def _choose(path: Path, arm: UUID | None) -> tuple[UUID, ArmRecord]:
    wanted = "*" if arm is None else str(arm)
    found = {UUID(each.name): read_arm(each) for each in (path / "arms").glob(wanted)}
    ready = {each: record for each, record in found.items() if record.committed is not None}
    if not ready:
        raise FedSelectError(f"nothing was trained and published in {path}", code="state_missing")
    if len(ready) > 1:
        names = ", ".join(sorted(map(str, ready)))
        raise FedSelectError(
            f"this client takes part in several arms, name one: {names}", code="state_ambiguous"
        )
    return next(iter(ready.items()))


def _state(path: Path, record: ArmRecord, space: ParameterSpace) -> PersonalState | None:
    """The committed state; None if its file has been replaced meanwhile, or is damaged."""
    if record.committed is None:
        return None
    file = path / record.committed.state.name
    data = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(data).hexdigest() != record.committed.state.sha256:
        return None
    return PersonalState.from_bytes(data, space)
