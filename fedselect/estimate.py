"""What a run would cost before anybody joins it: bytes, seconds, memory, storage.

Owns the estimate: a pure function of the model's space, the run's settings, the number of clients
and what was measured. Bytes follow from the mask schedule (``growth``) and the formats
(``filesizes``); times from constants that this repository's benchmarks measured. Must not train,
know rows or open files; a dry run at a site is ``dryrun``.

A client's participations are taken to be spread evenly: of ``clients``, ``per_round`` take part in
a round, so each does in every ``clients / per_round``-th.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from fedselect.deltas import Encoding
from fedselect.downloads import LONGEST_CHAIN
from fedselect.errors import SettingsError
from fedselect.estimatedocs import (
    MOST_STRETCHES,
    Against,
    ComputeTime,
    EncodingBytes,
    Estimate,
    EstimateCreate,
    LinkTime,
    ServerWork,
    Storage,
    Stretch,
    Traffic,
)
from fedselect.filesizes import NORMAL, Coding, UpdateFacts, delta_size, update_size, version_size
from fedselect.growth import MaskStage, bounds, course
from fedselect.lifecycle import retry_window, wanted
from fedselect.links import Link, link
from fedselect.masks import packed_size
from fedselect.policies import RunSettings
from fedselect.space import Kind, ParameterSpace, Role

ENCODINGS: tuple[Encoding, ...] = ("f32", "bf16", "int8")
MOST_STAGES = 1000  # that are worked out one by one; of more, evenly spread ones stand for all

# Seconds and bytes of two cores of an AMD EPYC: `make bench ONLY=kernel` (one client and element)
# and `make bench ONLY=publish` (a worker's processor time for a byte of an update; from the last
# update to the version, for an element; the peak of a worker), docs/PERFORMANCE.md.
KERNEL = 4.8e-3 / 25e6
VERIFY = 213e-3 / 32.8e6
PUBLISH = 1.4 / 11.2e6
PUBLISH_AT_LEAST = 0.4
WORKER_MEMORY = 267 * 1024**2
FLOPS = 1e10  # a second, of one core: assumed
CALLS = 8  # of one participation, one behind the other
# HTTP beside the files, of a participation and of one more check-in while a round goes on: `make
# bench ONLY=estimates` compares them with what agents count.
WORK_UP, WORK_DOWN = 2200, 8100
POLL_UP, POLL_DOWN = 1000, 1320


def single_tensor(elements: int) -> ParameterSpace:
    """A model of which nothing is known but its size: all of it may turn personal."""
    return ParameterSpace.of([("elements", (elements,), Kind.WEIGHT, Role.SELECTABLE)])


def estimate(
    asked: EstimateCreate, space: ParameterSpace, *, round_seconds: float | None = None
) -> Estimate:
    """What the run that ``asked`` describes would cost with the model of this space.

    How often clients ask while a round goes on follows from ``round_seconds``; None: as estimated.

    Raises:
        SettingsError: link_unknown, or too few clients for any round (``settings_invalid``).
        SpaceError: the policy does not fit the model.
    """
    plan = _Plan(space, asked.settings, asked.clients, asked.examples)
    plan.check()
    measured = Coding(asked.measured.value_bytes_up, asked.measured.value_bytes_down)
    own = asked.settings.wire.encoding
    courses = {each: _Course(plan, each, measured if each == own else NORMAL) for each in ENCODINGS}
    found = courses[own]
    compute = _compute(asked, plan)
    server = _server(plan, found)
    lines = [link(text) for text in asked.links]
    times = [_on_link(each, asked, found, compute, server) for each in lines]
    seconds = round_seconds or max(each.round_seconds for each in times)
    return Estimate(
        elements=space.dim,
        clients=plan.clients,
        per_round=plan.per_round,
        participations=plan.takes,
        encoding=own,
        masks=found.stretches(),
        **found.traffic(seconds / plan.settings.round.retry_after),
        evaluation_down=round(found.evaluation),
        encodings=[_encoding(each, courses[each]) for each in ENCODINGS],
        links=times,
        compute=compute,
        server=server,
        storage=_storage(plan, found),
        against=_against(asked, plan, found),
        assumptions=_assumptions(asked, plan),
    )


# --- who takes part ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    space: ParameterSpace
    settings: RunSettings
    clients: int
    examples: int

    def check(self) -> None:
        quorum = self.settings.round.quorum
        if self.clients < quorum:
            raise SettingsError(
                f"{self.clients} clients never reach quorum {quorum}, so no round would be "
                "published"
            )

    @cached_property
    def per_round(self) -> int:
        return min(self.clients, wanted(self.settings.round))

    @cached_property
    def takes(self) -> float:
        """Participations of one client."""
        return self.settings.rounds * self.per_round / self.clients

    @cached_property
    def gap(self) -> float:
        """Rounds between two participations of a client."""
        return self.clients / self.per_round

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """Elements that are personal in any mask, and at most."""
        return bounds(self.settings.policy, self.space)

    def still(self, personal: int) -> float:
        """Share of the elements that fewer clients share than must, when masks are independent."""
        lower, upper = self.bounds
        k = self.settings.round.min_contributors
        open_to_masks = upper - lower
        share = (personal - lower) / open_to_masks if open_to_masks else 0.0
        few = _fewer(self.per_round, k, round(share, 2))
        alone = float(self.per_round < k)
        fixed = self.space.dim - upper
        return (lower + few * open_to_masks + alone * fixed) / self.space.dim


@lru_cache(maxsize=1024)
def _fewer(clients: int, k: int, personal: float) -> float:
    """Chance that fewer than ``k`` of ``clients`` share an element, if each keeps it with the
    chance ``personal``.
    """
    if personal <= 0 or personal >= 1:
        return float(personal >= 1 or clients < k)
    logs = (
        math.lgamma(clients + 1)
        - math.lgamma(i + 1)
        - math.lgamma(clients - i + 1)
        + i * math.log(1 - personal)
        + (clients - i) * math.log(personal)
        for i in range(min(k, clients + 1))
    )
    return min(1.0, sum(map(math.exp, logs)))


# --- bytes -------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """What the participations of one stage exchange, each; ``weight`` is how many there are."""

    stage: MaskStage
    weight: float
    facts: UpdateFacts
    up: int
    down: float


@dataclass(frozen=True)
class _Course:
    """One client's files in one encoding."""

    plan: _Plan
    encoding: Encoding
    coding: Coding

    @cached_property
    def parts(self) -> list[_Part]:
        plan = self.plan
        stages = course(plan.settings.policy, plan.space, math.ceil(plan.takes))
        every = len(stages) // MOST_STAGES | 1  # odd: stages with and without a mask alternate
        found, sent = [], 0
        for number, stage in enumerate(stages):
            sent += stage.sent
            if number % every == 0:
                weight = min(stage.stop, plan.takes) - stage.first
                found.append(self._part(stage, every * weight, sent))
        scale = plan.takes / sum(part.weight for part in found)
        return [part._replace(weight=part.weight * scale) for part in found]

    def _part(self, stage: MaskStage, weight: float, sent: int) -> _Part:
        facts = UpdateFacts(
            self.plan.space.dim,
            stage.personal,
            mask=stage.sent,
            grown=stage.grown,
            masks_sent=sent,
            round=1 + int(stage.first * self.plan.gap),
            examples=self.plan.examples,
        )
        down = self.whole if stage.first == 0 else self.way(self.plan.gap, stage.personal)
        return _Part(stage, weight, facts, update_size(facts, self.encoding, self.coding), down)

    @cached_property
    def whole(self) -> int:
        return version_size(self.plan.space.dim)

    def delta(self, personal: int) -> int:
        """Bytes of a version's delta file; 0 in a run of values."""
        if self.encoding == "f32":
            return 0
        still = self.plan.still(personal)
        return delta_size(self.plan.space.dim, self.encoding, still=still, coding=self.coding)

    def way(self, versions: float, personal: int) -> float:
        """Bytes to get from a version that is held to the one so many further on."""
        if self.encoding == "f32":
            return self.whole
        delta = self.delta(personal)
        behind, part = int(versions), versions % 1

        def chain(length: int) -> int:
            fits = length <= LONGEST_CHAIN and length * delta < self.whole
            return length * delta if fits else self.whole

        return (1 - part) * chain(behind) + part * chain(behind + 1)

    @cached_property
    def evaluation(self) -> float:
        """Bytes that a client fetches for its evaluation: the last version, and version 0 if it
        did not begin with it.
        """
        plan = self.plan
        last = self.way((plan.gap + 1) / 2, self.parts[-1].stage.personal)
        began_later = 1 - 1 / plan.gap
        joined = min(1.0, plan.takes)
        return joined * (last + began_later * self.whole) + (1 - joined) * 2 * self.whole

    @cached_property
    def up(self) -> float:
        """Bytes of all updates of one client."""
        return sum(part.weight * part.up for part in self.parts)

    @cached_property
    def down(self) -> float:
        """Bytes of all versions and deltas that one client fetches, but for its evaluation."""
        return sum(part.weight * part.down for part in self.parts)

    def stretches(self) -> list[Stretch]:
        """The schedule as it is shown."""
        if len(self.parts) > MOST_STRETCHES:
            rows = [*self.parts[: MOST_STRETCHES - 1], self.parts[-1]]
        else:
            rows = self.parts
        return [self._stretch(part) for part in rows]

    def _stretch(self, part: _Part) -> Stretch:
        stage = part.stage
        bare = update_size(
            UpdateFacts(part.facts.dim, stage.personal, mask=False), self.encoding, self.coding
        )
        return Stretch(
            first=stage.first + 1,
            last=stage.stop,
            personal_share=stage.personal / part.facts.dim,
            mask="first" if stage.first == 0 else "grown" if stage.sent else "unchanged",
            mask_bytes=max(0, part.up - bare) if stage.sent else 0,
            update_bytes=part.up,
            download_bytes=round(part.down),
        )

    def traffic(self, polls: float) -> dict[str, Traffic]:
        """Traffic of a participation, a round, a client and the run; ``polls`` in each round."""
        plan = self.plan
        takes, rounds = plan.takes, plan.settings.rounds
        # Who is not chosen asks as often as who waits for the end of a round.
        asked = rounds * polls
        control = (takes * WORK_UP + asked * POLL_UP, takes * WORK_DOWN + asked * POLL_DOWN)
        whole = (self.up, self.down + self.evaluation, *control)
        each_round = plan.clients / rounds
        return {
            "participation": _traffic(1 / takes, self.up, self.down, *control),
            "round": _traffic(each_round, self.up, self.down, *control),
            "client": _traffic(1, *whole),
            "run": _traffic(plan.clients, *whole),
        }


def _traffic(factor: float, *figures: float) -> Traffic:
    names = ("up", "down", "control_up", "control_down")
    return Traffic(
        **{name: round(factor * each) for name, each in zip(names, figures, strict=True)}
    )


def _fedavg(plan: _Plan) -> int:
    return 8 * plan.space.dim * plan.per_round * plan.settings.rounds


def _encoding(name: Encoding, found: _Course) -> EncodingBytes:
    plan = found.plan
    down = found.down + found.evaluation
    share = plan.clients * (found.up + down) / _fedavg(plan)
    return EncodingBytes(encoding=name, up=round(found.up), down=round(down), of_fedavg=share)


# --- time --------------------------------------------------------------------------------------


def _compute(asked: EstimateCreate, plan: _Plan) -> ComputeTime:
    training = asked.settings.training
    passes = asked.settings.policy.passes
    steps = training.steps
    if steps is None:
        batches = -(-asked.examples // training.batch_size)
        steps = (training.epochs or 1) * passes * batches
    step = asked.measured.step_seconds
    trained = plan.space.count(Role.SELECTABLE, Role.SHARED)
    flops = 6 * trained * training.batch_size
    seconds = steps * (flops / FLOPS if step is None else step)
    return ComputeTime(steps=steps, seconds=seconds, basis="flops" if step is None else "measured")


def _server(plan: _Plan, found: _Course) -> ServerWork:
    clients, dim = plan.per_round, plan.space.dim
    return ServerWork(
        verify_seconds=clients * found.up / plan.takes * VERIFY,
        kernel_seconds=clients * dim * KERNEL,
        publish_seconds=max(PUBLISH_AT_LEAST, dim * PUBLISH),
        worker_memory=WORKER_MEMORY,
    )


def _on_link(
    line: Link, asked: EstimateCreate, found: _Course, compute: ComputeTime, server: ServerWork
) -> LinkTime:
    plan = found.plan
    up, down = found.up / plan.takes, found.down / plan.takes
    down_seconds, up_seconds = 8 * down / line.down, 8 * up / line.up
    store = link(asked.store_link)
    shared = 8 * plan.per_round * max(down / store.up, up / store.down)
    transfer = max(down_seconds + up_seconds, shared)
    work = CALLS * line.round_trip + transfer + compute.seconds
    seconds = _waiting(plan) + work + server.verify_seconds / asked.workers + server.publish_seconds
    return LinkTime(
        name=line.name,
        down_bits=line.down,
        up_bits=line.up,
        round_trip=line.round_trip,
        down_seconds=down_seconds,
        up_seconds=up_seconds,
        round_seconds=seconds,
        run_seconds=plan.settings.rounds * seconds,
    )


def _waiting(plan: _Plan) -> float:
    """Seconds until the last client that a round needs checks in; with fewer than its goal, the
    round waits for the selection deadline.
    """
    policy = plan.settings.round
    low, high = retry_window(policy.retry_after)
    last = low + (high - low) * plan.per_round / (plan.clients + 1)
    return last + (policy.selection_deadline if plan.clients < policy.goal else 0)


# --- the rest ----------------------------------------------------------------------------------


def _storage(plan: _Plan, found: _Course) -> Storage:
    rounds, clients = plan.settings.rounds, plan.clients
    deltas = sum(part.weight * found.delta(part.stage.personal) for part in found.parts)
    versions = rounds * (found.whole + deltas / plan.takes)
    # Masks are kept by content, and all first ones are the same.
    grown = sum(part.weight for part in found.parts if part.stage.sent and part.stage.first)
    masks = (1 + clients * grown) * packed_size(plan.space.dim)
    updates = clients * found.up
    return Storage(
        per_round=round((updates + masks + versions) / rounds),
        run=round(found.whole + updates + masks + versions),
        kept=round(found.whole + versions),
    )


def _against(asked: EstimateCreate, plan: _Plan, found: _Course) -> Against:
    total = plan.clients * (found.up + found.down + found.evaluation)
    central = None if asked.data_bytes is None else asked.data_bytes * plan.clients
    return Against(
        fedavg=_fedavg(plan),
        of_fedavg=total / _fedavg(plan),
        central=central,
        of_central=total / central if central else None,
    )


def _assumptions(asked: EstimateCreate, plan: _Plan) -> list[str]:
    policy, measured = asked.settings.round, asked.measured
    first = asked.settings.policy.first_use()
    values = measured.value_bytes_up is None or measured.value_bytes_down is None
    known: Sequence[tuple[bool, str]] = (
        (
            values or asked.settings.wire.encoding == "f32",
            "Coded deltas are taken as independent normal ones, than which nothing is harder to "
            "code: real ones are smaller. A dry run with the task measures them.",
        ),
        (
            measured.step_seconds is None,
            f"A client computes {FLOPS:.0e} floating point operations a second, 6 for each element "
            "and example. A dry run with the task measures a step.",
        ),
        (asked.elements is not None, "The whole model is one tensor that may turn personal."),
        (
            plan.settings.policy.personal == "learned",
            "Masks turn as the policy and every gate allow; what never moves stays shared.",
        ),
        (plan.gap > 1, "Participations are spread evenly over the clients and the run."),
        (
            first is not None and plan.takes <= first,
            f"No mask is ever used: the first one serves a client's participation "
            f"{(first or 0) + 1}, and each has {plan.takes:.1f}; raise rounds or goal, or lower "
            "policy.start_round.",
        ),
        (
            plan.clients < policy.goal,
            f"With {plan.clients} clients a goal of {policy.goal} is never reached: each round "
            "waits for its selection deadline.",
        ),
        (True, "Every client that is assigned sends its update, once; nobody drops out."),
    )
    return [text for applies, text in known if applies]
