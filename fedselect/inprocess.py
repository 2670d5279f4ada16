"""The two sides of a simulated run: the coordinator's line of versions, and each client's agent.

Owns what both remember between rounds. They exchange the files of the service, written and read as
it does. Must not train, or decide who takes part.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from os import urandom

import numpy as np

from fedselect.accounting import noise_rule
from fedselect.aggregate import Contribution, aggregate
from fedselect.agreement import agreement, dissent
from fedselect.batched import Job
from fedselect.blindrounds import blinded_mean
from fedselect.bounded import bounded, bounds_of, sift
from fedselect.checkpoints import ClientPart, Snapshot
from fedselect.clipping import clip_factor, round_bound
from fedselect.deltafiles import step
from fedselect.downloads import DeltaFacts, cheapest
from fedselect.evidence import DISSENT
from fedselect.feedback import write_update
from fedselect.filesizes import version_size
from fedselect.masks import Mask
from fedselect.noise import round_key
from fedselect.personal import Participation, PersonalState, derive_seed
from fedselect.policies import RunSettings
from fedselect.private import private_mean
from fedselect.space import FloatVector, ParameterSpace
from fedselect.training import TorchLearner
from fedselect.wire import (
    Update,
    UpdateMeta,
    UpdatePlan,
    decode_update,
    decode_version,
    encode_version,
    file_digest,
)

RUN = "simulation"


class Coordinator:
    """The line of versions, without storage and database; version 0 is ``start`` (D,)."""

    def __init__(self, space: ParameterSpace, start: FloatVector) -> None:
        self.space = space
        self.values = start
        self.versions: list[str] = []
        self._file = b""
        self._steps: list[DeltaFacts] = []
        self._norms: list[float] = []
        self._agreed: list[FloatVector] = []  # of the last rounds, if the policy asks for it
        self._record(encode_version(self.space.digest, self.values))

    def publish(
        self,
        accepted: Sequence[Update],
        settings: RunSettings,
        *,
        noise: FloatVector | None = None,
    ) -> None:
        """Aggregate a round's updates in the order accepted, and add ``noise`` (D,)."""
        by_examples = settings.round.weighting == "examples"
        parts = [
            Contribution(u.mask, u.values, float(u.meta.examples) if by_examples else 1.0)
            for u in accepted
        ]
        encoding = settings.wire.encoding
        base = self.values if encoding == "f32" else np.zeros_like(self.values)
        if settings.policy.pooled is not None:
            found = agreement(base, parts, settings.round.min_contributors)
            self._agreed = [*self._agreed, found][-settings.policy.window :]
        if settings.privacy.secure is not None:
            updates = [(each.mask, each.values) for each in accepted]
            found = blinded_mean(base, updates, settings, self.space, urandom)
        elif settings.privacy.dp is not None:
            found = self._noised(parts, settings)
        else:
            found = self._averaged(base, parts, settings)
        if noise is not None:
            found = found + noise
        if encoding == "f32":
            self._record(encode_version(self.space.digest, found))
        else:
            self._record(*step(self._file, found, space=self.space.digest, encoding=encoding))

    def _averaged(
        self, base: FloatVector, parts: Sequence[Contribution], settings: RunSettings
    ) -> FloatVector:
        rules, k = settings.influence, settings.round.min_contributors
        if rules is None:
            return aggregate(base, parts, k)
        found = sift(base, parts, rules)
        clip = round_bound(
            rules.clip_norm, rules.clip_quantile, before=self._norms, own=found.norms
        )
        self._norms = found.norms
        factors = [clip_factor(each, clip) for each in found.norms]
        return bounded(base, [parts[place] for place in found.kept], factors, bounds_of(rules), k)

    def _noised(self, parts: Sequence[Contribution], settings: RunSettings) -> FloatVector:
        rule = noise_rule(settings, self.space)
        secret = sha256(f"{RUN}/{settings.seed}".encode()).digest()  # as good as any, and known
        key = round_key(secret, self.versions[-1])
        return private_mean(self.values, parts, rule, key, deltas=settings.wire.encoding != "f32")

    def _record(self, file: bytes, delta: bytes | None = None) -> None:
        self._file = file
        self.values = decode_version(file, space_digest=self.space.digest, dim=self.space.dim)
        self.versions.append(file_digest(file))
        if delta is not None:
            before, newest = self.versions[-2:]
            self._steps.append(DeltaFacts(before, newest, len(delta)))

    def saved(self, clients: Mapping[str, ClientPart]) -> Snapshot:
        """Where the line of versions is, with the clients' parts."""
        return Snapshot(
            tuple(self.versions),
            self._file,
            tuple(self._steps),
            tuple(self._norms),
            clients,
            tuple(self._agreed),
        )

    def restore(self, found: Snapshot) -> None:
        """Go on from there."""
        self.values = decode_version(found.file, space_digest=self.space.digest, dim=self.space.dim)
        self._file, self.versions = found.file, list(found.versions)
        self._steps, self._norms = list(found.steps), list(found.norms)
        self._agreed = list(found.agreed)

    def dissent(self) -> FloatVector | None:
        """What the newest version says of agreement (``agreement``), (D,); None: nothing yet."""
        return dissent(self._agreed) if self._agreed else None

    def way(self, held: Container[str]) -> int:
        """Bytes from versions that a client holds to the newest, as the service would choose."""
        newest, size = self.versions[-1], len(self._file)
        chain = cheapest(self._steps[::-1], target=newest, size=size, held=held)
        if newest in held:
            return 0
        return size if chain is None else sum(each.size for each in chain)


class Client:
    """One client's agent and the coordinator's memory of its mask, in one place."""

    def __init__(self, name: str, learner: TorchLearner) -> None:
        self.name = name
        self.learner = learner
        self.bytes_up = 0
        self._bytes_down = 0
        self._held: set[str] = set()
        self._state: PersonalState | None = None
        self._known: Mask | None = None
        self._mask_version = 0

    def begin(self, coordinator: Coordinator, settings: RunSettings, *, number: int) -> Job:
        """Fetch what there is to train from."""
        self._fetch(coordinator)
        state = self._told(coordinator, settings)
        return Job(self.name, self.learner, state, derive_seed(settings, self.name, number))

    def _told(self, coordinator: Coordinator, settings: RunSettings) -> PersonalState | None:
        """The state; if it is to choose a mask by it, with what the version says of agreement."""
        policy = settings.policy
        chooses = policy.pooled is not None and policy.due(self.participations)
        found = coordinator.dissent() if chooses else None
        if found is None:
            return self._state
        state = self.final_state(coordinator.values, settings)
        return replace(state, evidence=state.evidence.with_terms(DISSENT, found))

    def send(
        self,
        coordinator: Coordinator,
        settings: RunSettings,
        result: Participation,
        *,
        number: int,
    ) -> Update:
        """Write the update file and read it back as the coordinator would."""
        meta = self._meta(coordinator, settings, result, number=number)
        data, state = write_update(
            meta,
            result,
            base=coordinator.values,
            before=self._state,
            known=self._known,
            send_mask=meta.mask_version > self._mask_version,
        )
        update = decode_update(data, self._plan(meta, settings))
        self._state = state
        self._known, self._mask_version = update.mask, update.meta.mask_version
        self.bytes_up += len(data)
        return update

    @property
    def participations(self) -> int:
        """How often the client has taken part."""
        return 0 if self._state is None else self._state.participations

    def saved(self) -> ClientPart:
        """All that is known of the client."""
        held = tuple(sorted(self._held))
        return ClientPart(self._state, self._mask_version, self.bytes_up, self._bytes_down, held)

    def restore(self, part: ClientPart) -> None:
        """Know that again; the coordinator knows the mask of the last upload."""
        self._state, self._mask_version = part.state, part.mask_version
        self.bytes_up, self._bytes_down = part.bytes_up, part.bytes_down
        self._held = set(part.held)
        self._known = None if part.state is None else part.state.merge_mask

    def final_state(self, values: FloatVector, settings: RunSettings) -> PersonalState:
        """The state after the last round; who never took part has the shared model (D,)."""
        if self._state is None:
            return PersonalState.start(values, settings.policy.first_mask(self.learner.space))
        return self._state

    def fetched(self, coordinator: Coordinator) -> int:
        """Bytes of all versions, once the last one and version 0 are here to be evaluated."""
        self._fetch(coordinator)
        origin = coordinator.versions[0] not in self._held
        return self._bytes_down + (version_size(coordinator.space.dim) if origin else 0)

    def _fetch(self, coordinator: Coordinator) -> None:
        """Get the newest version; an agent holds it and, if it had that, version 0."""
        self._bytes_down += coordinator.way(self._held)
        first, newest = coordinator.versions[0], coordinator.versions[-1]
        self._held = {newest, *({first} & self._held)}

    def _meta(
        self,
        coordinator: Coordinator,
        settings: RunSettings,
        result: Participation,
        *,
        number: int,
    ) -> UpdateMeta:
        return UpdateMeta(
            space=self.learner.space.digest,
            run=RUN,
            round=number,
            assignment=f"{self.name}/{number}",
            base_version=coordinator.versions[-1],
            mask_version=self._mask_version + (result.mask != self._known),
            examples=settings.disclosure.count(result.examples),
            encoding=settings.wire.encoding,
        )

    def _plan(self, meta: UpdateMeta, settings: RunSettings) -> UpdatePlan:
        lower, upper = settings.policy.bounds(self.learner.space)
        return UpdatePlan(
            space=meta.space,
            run=meta.run,
            round=meta.round,
            assignment=meta.assignment,
            base_version=meta.base_version,
            encoding=settings.wire.encoding,
            lower=lower,
            upper=upper,
            known_mask=self._known,
            known_mask_version=self._mask_version,
        )
