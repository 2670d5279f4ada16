"""Which policy a federation should use, and whether its pilot can tell: a pure rule with reasons.

Owns the rule. It claims no more than the figures: a leader that is not told from others by the
decisive intervals is no winner, and then what harms fewer clients, else what sends less, is
preferred. A run below 30 participations is a *short trial*: of the figures that this repository has
measured none is of a shorter run, and trials of forty steps chose wrongly. Must not compute
figures: they are ``comparison``'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fedselect import effects
from fedselect.comparedoc import ArmResult, Difference, Reason, Recommendation
from fedselect.lifecycle import RunState

LONG = 30  # participations of a client in every arm; fewer are a short trial
CHANCE = (1 - effects.LEVEL) / 2  # of clients that look harmed without any effect


def recommend(
    arms: Sequence[ArmResult], differences: Sequence[Difference], *, state: RunState
) -> Recommendation:
    """The recommendation.

    1. Controls (random or shuffled masks) are compared, never recommended.
    2. The leader has the highest pooled accuracy. Who is not worse by the decisive interval is
       tied with it.
    3. The leader alone: it is recommended. Otherwise, among those tied: the fewest clients harmed
       beyond what chance shows, then the fewest bytes sent, then the order of the settings.
    4. The data can tell if nobody is tied and the run was no short trial.
    """
    candidates = [arm for arm in arms if not arm.control and arm.pooled is not None]
    why = _unfit(arms, candidates, differences, state)
    if why is not None:
        return _nothing(why, short=_short(arms))
    leader = max(candidates, key=_percent)
    tied = [a for a in candidates if a is not leader and _verdict(leader, a, differences) == "even"]
    chosen = min([leader, *tied], key=lambda arm: (_harmed(arm), arm.sent_bytes_each or 0.0))
    short = _short(arms)
    few = any(arm.clients < effects.ENOUGH_CLIENTS for arm in arms)
    return Recommendation(
        policy=chosen.name,
        leader=leader.name,
        tied=[arm.name for arm in tied],
        can_tell=not tied and not short,
        scope="these_clients" if few else "population",
        short=short,
        reasons=[
            *_about_leader(leader, tied, candidates, differences),
            *_about_choice(chosen, leader, tied),
            *_about_controls(leader, arms, differences),
            *_cautions(chosen, arms, differences, short=short, few=few),
        ],
    )


def _nothing(why: Reason, *, short: bool) -> Recommendation:
    return Recommendation(
        policy=None,
        leader=None,
        tied=[],
        can_tell=False,
        scope="these_clients",
        short=short,
        reasons=[why],
    )


def _unfit(
    arms: Sequence[ArmResult],
    candidates: Sequence[ArmResult],
    differences: Sequence[Difference],
    state: RunState,
) -> Reason | None:
    """Why nothing can be recommended, if so."""
    if len(arms) < 2:
        return _reason("one_arm", "The run has one arm: there is nothing to compare it with.")
    if state is not RunState.FINISHED:
        return _reason(
            "not_finished", f"The run is {state.value}; arms are judged when it has finished."
        )
    if not differences:
        return _reason("no_scores", "Too few clients have reported scores in every arm.")
    if not candidates:
        return _reason("controls_only", "All arms are controls; name a policy to compare them to.")
    return None


# --- facts -------------------------------------------------------------------------------------


def _percent(arm: ArmResult) -> float:
    return arm.pooled.percent if arm.pooled is not None else -1.0


def _difference(
    one: ArmResult, other: ArmResult, all_: Sequence[Difference]
) -> tuple[Difference, int]:
    """Their difference, and 1 or, if it is stated the other way round, −1."""
    for each in all_:
        if (each.arm, each.against) == (one.name, other.name):
            return each, 1
        if (each.arm, each.against) == (other.name, one.name):
            return each, -1
    raise ValueError(f"no difference of {one.name} and {other.name}")


def _verdict(one: ArmResult, other: ArmResult, all_: Sequence[Difference]) -> str:
    """better, worse or even: what the decisive interval says of ``one``."""
    found, sign = _difference(one, other, all_)
    if found.verdict == "undecided":
        return "even"
    return "better" if (found.verdict == "better") == (sign == 1) else "worse"


def _harmed(arm: ArmResult) -> int:
    """Clients harmed beyond what chance alone would show, against the baseline that shows most."""
    known = [arm.effects[name] for name in effects.JUDGED if name in arm.effects]
    excess = (len(each.harmed or ()) - math.ceil(CHANCE * each.clients) for each in known)
    return max(0, *excess) if known else 0


def _short(arms: Sequence[ArmResult]) -> bool:
    return any(arm.participations is None or arm.participations < LONG for arm in arms)


# --- reasons -----------------------------------------------------------------------------------


def _reason(code: str, text: str) -> Reason:
    return Reason(code=code, text=text)


def _about_leader(
    leader: ArmResult,
    tied: Sequence[ArmResult],
    candidates: Sequence[ArmResult],
    differences: Sequence[Difference],
) -> Iterator[Reason]:
    yield _reason(
        "leader",
        f"{leader.name} scores highest: {_percent(leader):.1f} % of all held-out examples of "
        f"{leader.clients} clients, with their own models.",
    )
    for other in candidates:
        if other is leader:
            continue
        found, sign = _difference(leader, other, differences)
        ends = sorted((sign * found.decisive.low, sign * found.decisive.high))
        text = (
            f"{leader.name} − {other.name}: {sign * found.pooled_points:+.1f} points, "
            f"{found.level_percent:.1f} % interval {ends[0]:+.1f} to {ends[1]:+.1f}, over "
            f"{'clients' if found.unit == 'clients' else 'the examples of these clients'}"
        )
        if other in tied:
            yield _reason("not_distinguishable", f"{text}: it contains 0, not distinguishable.")
        else:
            yield _reason("distinguishable", f"{text}: it does not contain 0.")


def _about_choice(
    chosen: ArmResult, leader: ArmResult, tied: Sequence[ArmResult]
) -> Iterator[Reason]:
    if not tied:
        return
    even = [leader, *tied]
    harm = _harmed(chosen)
    if any(_harmed(arm) > harm for arm in even):
        text = f"{chosen.name} harms fewer clients beyond chance ({harm}) than others that do "
        yield _reason("safer", f"{text}as well.")
    rivals = [arm for arm in even if arm is not chosen and _harmed(arm) == harm]
    dearer = [a for a in rivals if (a.sent_bytes_each or 0) > (chosen.sent_bytes_each or 0)]
    if dearer:
        size = (chosen.sent_bytes_each or 0.0) / 1e6
        names = ", ".join(arm.name for arm in dearer)
        text = f"{chosen.name} sends less: {size:.3f} MB a client; {names} do as well and send more"
        yield _reason("cheaper", f"{text}.")
    elif len(rivals) and not any(_harmed(arm) > harm for arm in even):
        yield _reason("first", f"{chosen.name} is the first of those that do as well and cost it.")


def _about_controls(
    leader: ArmResult, arms: Sequence[ArmResult], differences: Sequence[Difference]
) -> Iterator[Reason]:
    for arm in arms:
        if arm.control and _verdict(leader, arm, differences) != "better":
            yield _reason(
                "control_as_good",
                f"The control {arm.name} is not told from {leader.name}: nothing here shows that "
                "it matters which elements are personal.",
            )


def _cautions(
    chosen: ArmResult,
    arms: Sequence[ArmResult],
    differences: Sequence[Difference],
    *,
    short: bool,
    few: bool,
) -> Iterator[Reason]:
    if _harmed(chosen):
        text = f"{chosen.name} harms {_harmed(chosen)} clients beyond what chance alone would show"
        yield _reason("harms", f"{text}; see its report.")
    best = max((a for a in arms if a.worst is not None), key=_worst, default=None)
    if best is not None and _worst(best) - _worst(chosen) > effects.WORSE_POINTS:
        yield _reason(
            "worst_client",
            f"The worst client has {_worst(chosen):.1f} % with {chosen.name}, with {best.name} the "
            f"worst one has {_worst(best):.1f} %; what is said above is of the mean.",
        )
    if any(found.uneven for found in differences):
        yield _reason("uneven", "Some clients trained more often in one arm than in another.")
    if few:
        yield _reason(
            "few_clients",
            f"Below {effects.ENOUGH_CLIENTS} clients an arm nothing follows for clients that join "
            "later: insufficient evidence, an administrator decides.",
        )
    if short:
        yield _reason(
            "short_trial",
            f"A client trained fewer than {LONG} times in some arm: a short trial. Such trials "
            "have chosen the wrong policy; run the arms to the end of a long pilot.",
        )
    yield _reason(
        "limits",
        "Chance in examples and clients is all that the intervals speak of: not of another seed, "
        "other data or later times.",
    )


def _worst(arm: ArmResult) -> float:
    return arm.worst.percent if arm.worst is not None else 0.0
