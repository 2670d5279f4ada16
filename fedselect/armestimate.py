"""What a run of several arms would cost: the estimates of its arms, put together.

Owns the sums over arms; one arm's figures are ``estimate``'s. In parallel arms a client does all of
them, in randomized ones its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from fedselect.accounting import account, useless
from fedselect.estimate import estimate
from fedselect.estimatedocs import (
    Against,
    ArmEstimate,
    ComputeTime,
    EncodingBytes,
    Estimate,
    EstimateCreate,
    LinkTime,
    ServerWork,
    Storage,
    Traffic,
)
from fedselect.filesizes import version_size
from fedselect.policies import Policy
from fedselect.space import ParameterSpace

Combine = Callable[[Iterable[float]], float]


def estimate_run(
    asked: EstimateCreate, space: ParameterSpace, *, round_seconds: float | None = None
) -> Estimate:
    """:func:`~fedselect.estimate.estimate` of a run with all of its arms.

    Raises:
        SettingsError: link_unknown, too few clients for any round (``settings_invalid``), or
            ``accountant_missing``.
        SpaceError: a policy does not fit the model.
    """
    arms = asked.settings.arms
    if arms is None:
        return _accounted(estimate(asked, space, round_seconds=round_seconds), asked, space)
    arms = arms.settled(asked.clients)
    names = [policy.name for policy in arms.policies]
    parallel = arms.mode == "parallel"
    clients = asked.clients if parallel else asked.clients // len(names)
    found = []
    for name in names:
        alone = {"settings": asked.settings.of_arm(name), "clients": clients}
        each = estimate(asked.model_copy(update=alone), space, round_seconds=round_seconds)
        found.append(each)
    version = version_size(space.dim)
    if parallel:
        whole = _parallel(found, version, again=_fetched_again(asked, found, version))
    else:
        whole = _randomized(found, version)
    return whole.model_copy(
        update={
            "clients": asked.clients,
            "against": _against(found, whole, asked),
            "arms": [_arm(name, each) for name, each in zip(names, found, strict=True)],
            "assumptions": [
                *dict.fromkeys(text for each in found for text in each.assumptions),
                _TIME if parallel else f"The clients are split evenly, {clients} an arm.",
            ],
        }
    )


def _accounted(found: Estimate, asked: EstimateCreate, space: ParameterSpace) -> Estimate:
    """With what differential privacy promises, and whether such a run would be refused."""
    privacy = account(asked.settings, space, accuracy_cost=asked.measured.accuracy_cost)
    fault = useless(asked.settings, space)
    words = [] if fault is None else [f"A run with these settings is refused: {fault}."]
    said = {"privacy": privacy, "assumptions": [*words, *found.assumptions]}
    return found.model_copy(update=said)


_TIME = (
    "Arms without personal elements yet publish the same files, which a client fetches once. "
    "Check-ins are counted for each arm, and the rounds of parallel arms are taken one after the "
    "other; where arms overlap, there are fewer and it takes less."
)


def _fetched_again(asked: EstimateCreate, found: Sequence[Estimate], version: int) -> int:
    """Bytes that a client would receive again, had it not fetched them for another arm.

    All arms share version 0. Arms that share everything at first publish the same versions until
    the first mask serves, if the same clients take part: all of them.
    """
    again = (len(found) - 1) * version
    rounds, policies = asked.settings.rounds, asked.settings.policies
    if found[0].per_round < asked.clients:
        return again
    until = [_alike(policy, rounds) for policy in policies]
    first = until.index(max(until))
    for number, each in enumerate(found):
        if number != first:
            again += _downloads(each, until[number], rounds)
    return again


def _alike(policy: Policy, rounds: int) -> int:
    """The last version that is what FedAvg would publish."""
    shares_first = policy.personal in {"none", "learned"} or policy.late
    plain = policy.passes == 1 and policy.trains == "all" and policy.direction == "grow"
    if not (plain and shares_first):
        return 0
    use = policy.first_use()
    aside = policy.window if policy.gate != "none" else 0  # rounds that train on less
    return rounds if use is None else max(0, use - aside)


def _downloads(found: Estimate, last: int, rounds: int) -> int:
    """Bytes of versions 1 to ``last``, as an arm's client fetches them."""
    total = found.evaluation_down if last >= rounds else 0
    for stretch in found.masks:
        begin, end = max(stretch.first, 2), min(stretch.last, last + 1)
        total += max(0, end - begin + 1) * stretch.download_bytes
    return total


def _parallel(found: Sequence[Estimate], version: int, *, again: int) -> Estimate:
    clients = found[0].clients
    return _combined(found, sum).model_copy(
        update={
            "client": _traffic([e.client for e in found], sum, less=again),
            "run": _traffic([e.run for e in found], sum, less=clients * again),
            "evaluation_down": sum(e.evaluation_down for e in found),
            "storage": _storage(found, (len(found) - 1) * version),
        }
    )


def _randomized(found: Sequence[Estimate], version: int) -> Estimate:
    again = (len(found) - 1) * version
    return _combined(found, max).model_copy(
        update={
            "client": _traffic([e.client for e in found], _mean),
            "evaluation_down": round(_mean(e.evaluation_down for e in found)),
            "storage": _storage(found, again),
        }
    )


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)


def _combined(found: Sequence[Estimate], time: Combine) -> Estimate:
    """What both modes have in common; ``time`` says how the arms' seconds make up a round's."""
    own = sum if time is sum else _mean
    return found[0].model_copy(
        update={
            "per_round": sum(e.per_round for e in found) if time is max else found[0].per_round,
            "participations": own(e.participations for e in found),
            "participation": _traffic([e.participation for e in found], _mean),
            "round": _traffic([e.round for e in found], sum),
            "run": _traffic([e.run for e in found], sum),
            "encodings": [_encoding(each, own) for each in _columns(e.encodings for e in found)],
            "links": [_link(each, time) for each in _columns(e.links for e in found)],
            "compute": ComputeTime(
                steps=max(e.compute.steps for e in found),
                seconds=_mean(e.compute.seconds for e in found),
                basis=found[0].compute.basis,
            ),
            "server": ServerWork(
                verify_seconds=sum(e.server.verify_seconds for e in found),
                kernel_seconds=sum(e.server.kernel_seconds for e in found),
                publish_seconds=sum(e.server.publish_seconds for e in found),
                worker_memory=max(e.server.worker_memory for e in found),
            ),
        }
    )


T = TypeVar("T")


def _columns(rows: Iterable[Sequence[T]]) -> list[tuple[T, ...]]:
    return list(zip(*rows, strict=True))


def _traffic(found: Sequence[Traffic], how: Combine, *, less: int = 0) -> Traffic:
    """``less``: bytes that are not received again for each arm."""
    names = Traffic.model_fields
    figures = {name: round(how(getattr(each, name) for each in found)) for name in names}
    return Traffic(**{**figures, "down": figures["down"] - less})


def _encoding(found: Sequence[EncodingBytes], how: Combine) -> EncodingBytes:
    return EncodingBytes(
        encoding=found[0].encoding,
        up=round(how(each.up for each in found)),
        down=round(how(each.down for each in found)),
        of_fedavg=how(each.of_fedavg for each in found),
    )


def _link(found: Sequence[LinkTime], time: Combine) -> LinkTime:
    return found[0].model_copy(
        update={
            "down_seconds": _mean(each.down_seconds for each in found),
            "up_seconds": _mean(each.up_seconds for each in found),
            "round_seconds": time(each.round_seconds for each in found),
            "run_seconds": time(each.run_seconds for each in found),
        }
    )


def _storage(found: Sequence[Estimate], again: int) -> Storage:
    return Storage(
        per_round=sum(e.storage.per_round for e in found),
        run=sum(e.storage.run for e in found) - again,
        kept=sum(e.storage.kept for e in found) - again,
    )


def _against(found: Sequence[Estimate], whole: Estimate, asked: EstimateCreate) -> Against:
    """Against one run of FedAvg with the places of one arm, and against everybody's data."""
    moved = whole.run.up + whole.run.down
    fedavg = found[0].against.fedavg
    central = None if asked.data_bytes is None else asked.data_bytes * asked.clients
    return Against(
        fedavg=fedavg,
        of_fedavg=moved / fedavg,
        central=central,
        of_central=moved / central if central else None,
    )


def _arm(name: str, found: Estimate) -> ArmEstimate:
    return ArmEstimate(
        name=name,
        clients=found.clients,
        masks=found.masks,
        client=found.client,
        run=found.run,
        of_fedavg=found.against.of_fedavg,
    )
