"""From masks and an ablation to the explanation of one client's mask, in figures and sentences.

Owns which figures are formed, which are withheld, and the sentences. The statistics of a loss are
``effects``. Must not read rows, files or a clock, and gives no mask, digest or element number away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from fedselect import effects
from fedselect.evaluations import ScoreReport
from fedselect.explaindocs import (
    LEAST_ELEMENTS,
    AblationReport,
    Explanation,
    Loss,
    Measurement,
    TensorAblation,
    TensorExplanation,
)
from fedselect.masks import Mask
from fedselect.policies import RunSettings
from fedselect.reportdoc import MaskReading, Sign
from fedselect.space import Kind, ParameterSpace, Role, Slot

MOST_TENSORS = 200  # of one explanation: the largest
NOUNS = {Kind.WEIGHT: "weights", Kind.BIAS: "biases", Kind.NORM: "scales"}
_TURNED: dict[Sign, Sign] = {"gain": "loss", "loss": "gain", "undecided": "undecided"}


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose mask is explained; without a run it is explained at its own site."""

    client_name: str
    model: str
    round: int
    client_id: UUID | None = None
    run_id: UUID | None = None
    run_name: str | None = None


@dataclass(frozen=True, slots=True)
class Ablated:
    """What the client has measured, with which version and when."""

    report: AblationReport
    version: int | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Known:
    """What an explanation is made of: the client's mask, those of others, its ablation."""

    space: ParameterSpace
    mask: Mask
    others: Sequence[Mask] = ()
    ablated: Ablated | None = None
    reading: MaskReading | None = None


def explain(
    subject: Subject, settings: RunSettings, known: Known, *, made_at: datetime
) -> Explanation:
    """The explanation; what is said of fewer than the run's ``report.min_…`` is left out."""
    space, rule = known.space, settings.told
    measured = _measurement(known.ablated, rule.min_examples)
    compared = len(known.others) if len(known.others) >= rule.min_clients else 0
    every = list(_tensors(known, rule.min_clients, rule.min_examples))
    elements = sum(each.elements for each in every)
    chosen = sum(each.chosen for each in every)
    largest = sorted(every, key=lambda each: -each.elements)[:MOST_TENSORS]
    bare = Explanation(
        made_at=made_at,
        run_id=subject.run_id,
        run_name=subject.run_name,
        client_id=subject.client_id,
        client_name=subject.client_name,
        model=subject.model,
        policy=settings.policy.name,
        round=subject.round,
        suppression=rule,
        elements=elements,
        chosen=chosen,
        percent=_percent(chosen, elements),
        compared=compared,
        fixed=[slot.name for slot in space.with_role(Role.PERSONAL)],
        measured=measured,
        tensors=sorted(largest, key=lambda each: (each.rank, each.name)),
        tensors_left_out=len(every) - len(largest),
        reading=known.reading,
        summary=[],
    )
    told = settings.disclosure
    summary = [*_summary(bare), *([told.words()] if told.rounds else [])]
    return bare.model_copy(update={"summary": summary})


def _measurement(found: Ablated | None, least: int) -> Measurement | None:
    if found is None:
        return None
    report = found.report.withholding(least)
    whole = report.whole
    return Measurement(
        version=found.version,
        at=found.at,
        withheld=whole is None,
        whole=None if whole is None else effects.accuracy(whole),
        lost=lost(whole, report.without),
    )


def lost(whole: ScoreReport | None, without: ScoreReport | None) -> Loss | None:
    """What is lost without something, in points, with the interval of paired shares."""
    if whole is None or without is None:
        return None
    found = effects.gain(whole, without, judged=False)
    return Loss(
        points=found.points,
        interval=found.interval,
        examples=found.examples,
        paired=found.paired,
        sign=_TURNED[found.sign],
    )


# --- tensors -----------------------------------------------------------------------------------


def _tensors(known: Known, min_clients: int, min_examples: int) -> Iterator[TensorExplanation]:
    chosen = known.mask - Mask.initial(known.space)
    counts = chosen.per_slot(known.space)
    slots = [slot for slot in known.space.slots if slot.size and _free(slot, counts)]
    shares = {slot.name: counts[slot.name] / slot.size for slot in slots}
    others = _others(known, chosen) if len(known.others) >= min_clients else {}
    report = known.ablated.report.withholding(min_examples) if known.ablated else None
    measured = {each.name: each for each in report.tensors} if report else {}
    for slot in slots:
        count, share = counts[slot.name], shares[slot.name]
        found = measured.get(slot.name)
        loss = lost(report.whole, found.score) if report and found else None
        yield TensorExplanation(
            name=slot.name,
            kind=slot.kind.value,
            elements=slot.size,
            chosen=count,
            percent=100 * share,
            rank=1 + sum(other > share for other in shares.values()),
            **_agreement(others.get(slot.name), slot, count),
            **_values(found if count >= LEAST_ELEMENTS else None),
            lost=loss,
            text=sentence(slot, count, loss),
        )


def _free(slot: Slot, counts: Mapping[str, int]) -> bool:
    """Whether the policy could choose from a tensor; one that fixes biases did choose them."""
    return slot.role is Role.SELECTABLE or bool(counts[slot.name])


@dataclass(frozen=True, slots=True)
class _Met:
    """One tensor at the other clients: how many chose its elements, the client's own among them,
    summed over clients; and how many of the client's own any of them chose.
    """

    clients: int
    chosen: int
    both: int
    met: int


def _others(known: Known, chosen: Mask) -> dict[str, _Met]:
    space, fixed = known.space, Mask.initial(known.space)
    total, both = dict.fromkeys(space.by_name, 0), dict.fromkeys(space.by_name, 0)
    union = Mask.empty(space.dim)
    for mask in known.others:
        theirs = mask - fixed
        union = union | theirs
        for name, count in theirs.per_slot(space).items():
            total[name] += count
        for name, count in (theirs & chosen).per_slot(space).items():
            both[name] += count
    known_to_any = (union & chosen).per_slot(space)
    n = len(known.others)
    return {name: _Met(n, total[name], both[name], known_to_any[name]) for name in total}


def _agreement(met: _Met | None, slot: Slot, chosen: int) -> dict[str, float | None]:
    if met is None or not chosen:
        return dict.fromkeys(("others_percent", "chance_percent", "alone_percent"))
    return {
        "others_percent": _percent(met.both, met.clients * chosen),
        "chance_percent": _percent(met.chosen, met.clients * slot.size),
        "alone_percent": _percent(chosen - met.met, chosen),
    }


def _values(found: TensorAblation | None) -> dict[str, float | None]:
    names = ("threshold", "delta_chosen", "delta_shared", "distance_percent")
    return {name: getattr(found, name) if found else None for name in names}


def _percent(count: int, of: int) -> float:
    return 100 * count / of if of else 0.0


# --- sentences ---------------------------------------------------------------------------------


def sentence(slot: Slot, chosen: int, loss: Loss | None) -> str:
    """What a tensor's personal part is and what it is worth, in words."""
    noun = NOUNS.get(slot.kind, "values")
    if not chosen:
        return f"In layer {slot.name} none of the {slot.size:,} {noun} is this site's own."
    verb = "is" if chosen == 1 else "are"
    text = f"In layer {slot.name} {chosen:,} of {slot.size:,} {noun} {verb} this site's own"
    return f"{text}; without them {_would(loss)}." if loss else f"{text}."


def _would(loss: Loss) -> str:
    """What would happen without something."""
    low, high = loss.interval.low, loss.interval.high
    if loss.sign == "loss":
        return f"it would lose {loss.points:.1f} points ({low:.1f} to {high:.1f})"
    if loss.sign == "gain":
        return (
            f"it would gain {-loss.points:.1f} points ({-high:.1f} to {-low:.1f}): the shared "
            "values would serve it better"
        )
    change = "exactly as many right" if not loss.points else f"{-loss.points:+.1f} points"
    return (
        f"its accuracy would change by so little ({change}) that {loss.examples:,} examples cannot "
        f"tell it from chance (95 % interval {-high:+.1f} to {-low:+.1f})"
    )


def _summary(found: Explanation) -> Iterator[str]:
    share = f"{found.chosen:,} of {found.elements:,}, {found.percent:.1f} %"
    yield (
        f"Of the parameters that policy {found.policy} can make personal, {share}, are "
        f"{found.client_name}'s own. Their values have never left the site; all others are the "
        "same at every site."
    )
    yield from _measured(found)
    owned = [each for each in found.tensors if each.chosen]
    if owned:
        first = owned[0]
        yield (
            f"The largest share of a layer that is its own is {first.percent:.1f} %, in "
            f"{first.name}."
        )
    yield from _compared(found, owned)
    if found.fixed:
        yield (
            f"{len(found.fixed)} tensors are every site's own whatever the policy chooses, such as "
            "statistics of its data; they are not counted here."
        )


def _measured(found: Explanation) -> Iterator[str]:
    measured = found.measured
    if measured is None:
        yield "What they are worth was not measured: no ablation of this client has come in."
        return
    if measured.withheld or measured.whole is None:
        yield (
            "What they are worth is withheld: the site has fewer than "
            f"{found.suppression.min_examples} held-out examples."
        )
        return
    whole = measured.whole
    text = f"With them it gets {whole.percent:.1f} % of its {whole.examples:,} held-out examples "
    text += f"right ({whole.interval.low:.1f} to {whole.interval.high:.1f})"
    yield f"{text}; without any of them {_would(measured.lost)}." if measured.lost else f"{text}."
    if measured.version is not None and measured.version < found.round:
        yield (
            f"That was measured with version {measured.version}; the parameters counted here are "
            f"those of round {found.round}, so ask for a new ablation before comparing the two."
        )
    losing = [each for each in found.tensors if each.lost and each.lost.sign == "loss"]
    if losing:
        worth = max(losing, key=lambda each: each.lost.points if each.lost else 0.0)
        yield f"The layer whose own part is worth most is {worth.name}. {worth.text}"
    elif found.chosen:
        yield "Of no single layer can it be told from so many examples that its part is needed."


def _compared(found: Explanation, owned: Sequence[TensorExplanation]) -> Iterator[str]:
    if not found.compared:
        if found.run_id is not None:
            yield (
                "Whether others chose the same is not said: it takes at least "
                f"{found.suppression.min_clients} other clients whose masks are there."
            )
        return
    met = [each for each in owned if each.others_percent is not None]
    chosen = sum(each.chosen for each in met)
    if not chosen:
        return
    mean = sum((each.others_percent or 0) * each.chosen for each in met) / chosen
    blind = sum((each.chance_percent or 0) * each.chosen for each in met) / chosen
    alone = sum((each.alone_percent or 0) * each.chosen for each in met) / chosen
    yield (
        f"Of the {found.compared} other clients {mean:.1f} % chose such an element too, in the "
        f"mean; had they chosen blindly it would be {blind:.1f} %. {alone:.1f} % of its elements "
        "nobody else chose."
    )
