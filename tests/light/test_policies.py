"""Policies and run settings: refused combinations, presets, the mask clock, the mask's bounds."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedselect.errors import SettingsError, SpaceError
from fedselect.masks import Mask
from fedselect.policies import (
    LATE,
    PRESETS,
    Influence,
    Policy,
    RoundPolicy,
    RunSettings,
    Settings,
    Training,
    later,
    preset,
    preset_run,
)
from fedselect.scalars import Whole
from fedselect.space import Kind, ParameterSpace, Role

FAST = settings(max_examples=150, deadline=None, derandomize=True)
DP = {"clip": 1.0, "noise": 1.0, "epsilon": 8.0}
POOLED_ROWS = Policy(pooled=1, scope="row")
THREE = RoundPolicy(min_contributors=3)
MODELS = [Policy, RoundPolicy, RunSettings, Training]


def minimal(model: type) -> dict:
    return {"steps": 1} if model is Training else {}


@pytest.mark.parametrize("model", MODELS)
def test_an_unknown_setting_is_an_error(model):
    assert model(**minimal(model))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model(**minimal(model), growht=0.1)


def test_an_unknown_setting_inside_is_an_error_too():
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunSettings.model_validate({"policy": {"grwoth": 0.1}})


@pytest.mark.parametrize("model", MODELS)
def test_settings_are_immutable(model):
    made = model(**minimal(model))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(model.model_fields)), 1)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (Policy, {"personal": "some"}),
        (Policy, {"score": "gradient"}),
        (Policy, {"growth": -0.01}),
        (Policy, {"growth": 1.01}),
        (Policy, {"growth": float("nan")}),
        (Policy, {"limit": 1.5}),
        (Policy, {"limit_mode": "soft"}),
        (Policy, {"interval": 0}),
        (Policy, {"start_round": -1}),
        (Policy, {"schedule": "both"}),
        (Policy, {"name": "x" * 65}),
        (Policy, {"scope": "layer"}),
        (Policy, {"elements": "biases"}),
        (Policy, {"fraction": 0}),
        (Policy, {"fraction": 1.1}),
        (Policy, {"direction": "shrink"}),
        (Policy, {"shuffled": 1}),
        (Policy, {"window": 0}),
        (Policy, {"gate": "test"}),
        (Policy, {"gate": "holdout"}),
        (Policy, {"gate": "holdout", "personal": "head"}),
        (Policy, {"gate": "holdout", "personal": "none", "fraction": 0.02}),
        (Policy, {"shuffled": True, "scope": "row"}),
        (Policy, {"trains": "body"}),
        (Policy, {"personal_rate": 0.5}),
        (Policy, {"personal_rate": 3, "personal": "none"}),
        (Policy, {"pooled": 0}),
        (Policy, {"pooled": 1, "personal": "head"}),
        (Policy, {"pooled": 1, "score": "random"}),
        (Policy, {"proximal": 0}),
        (Policy, {"proximal": 0.1}),
        (Policy, {"proximal": 0.1, "personal": "none", "finetune": True}),
        (Training, {"steps": 0}),
        (Training, {"steps": None}),
        (Training, {"steps": 5, "epochs": 1}),
        (Training, {"steps": 1, "learning_rate": 0}),
        (Training, {"steps": 1, "learning_rate": float("inf")}),
        (Training, {"steps": 1, "batch_size": 0}),
        (Training, {"steps": 1, "clip_norm": 0}),
        (RoundPolicy, {"goal": 0}),
        (RoundPolicy, {"over_selection": 0.9}),
        (RoundPolicy, {"over_selection": float("nan")}),
        (RoundPolicy, {"quorum": 0}),
        (RoundPolicy, {"goal": 3, "quorum": 4}),
        (RoundPolicy, {"goal": 3, "min_contributors": 4}),
        (RoundPolicy, {"min_contributors": 0}),
        (RoundPolicy, {"weighting": "loss"}),
        (RoundPolicy, {"late": "accept"}),
        (RoundPolicy, {"selection_deadline": 0}),
        (RoundPolicy, {"report_deadline": float("inf")}),
        (RoundPolicy, {"max_attempts": 0}),
        (RunSettings, {"rounds": 0}),
        (RunSettings, {"seed": -1}),
        (RunSettings, {"seed": 2**63}),
        (RunSettings, {"policy": preset("ditto"), "training": Training(steps=1)}),
        (RunSettings, {"policy": Policy(pooled=1), "influence": {"clip_norm": 1.0}}),
        (RunSettings, {"policy": POOLED_ROWS, "privacy": {"dp": DP}}),
        (RunSettings, {"policy": POOLED_ROWS, "privacy": {"secure": {}}, "round": THREE}),
    ],
)
def test_values_out_of_bounds(model, change):
    with pytest.raises(ValidationError):
        model(**change)


def test_what_agreement_does_not_go_with_is_fine_without_it():
    """So that the refusals above are of agreement."""
    rows = Policy(scope="row")
    RunSettings(influence={"clip_norm": 1.0})
    RunSettings(policy=rows, privacy={"dp": DP})
    RunSettings(policy=rows, privacy={"secure": {}}, round=THREE)


def test_settings_survive_json():
    for name in PRESETS:
        made = preset_run(name, rounds=60, seed=7)
        assert RunSettings.model_validate(json.loads(made.model_dump_json())) == made


# --- the mask clock ----------------------------------------------------------------------------


@FAST
@given(
    st.builds(
        Policy,
        personal=st.sampled_from(["learned", "none", "all", "head"]),
        growth=st.sampled_from([0, 0.05, 1]),
        limit=st.sampled_from([0, 0.3, 1]),
        interval=st.integers(1, 7),
        start_round=st.integers(0, 12),
    )
)
def test_the_first_use_follows_the_first_growth(policy):
    due = [n for n in range(60) if policy.due(n)]
    grows = policy.personal != "learned" or (policy.growth > 0 and policy.limit > 0)
    assert policy.first_use() == (due[0] + 1 if due and grows else None)
    if policy.personal == "learned":
        assert 0 not in due
        assert {b - a for a, b in pairwise(due)} == {policy.interval}
    else:
        waits = policy.personal != "none" and policy.start_round
        assert due == ([policy.start_round - 1] if waits else [])


@FAST
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 30))
def test_a_run_in_which_no_mask_is_used_is_refused(interval, start, rounds):
    policy = Policy(interval=interval, start_round=start)
    used = any(policy.due(n) for n in range(rounds - 1))
    if used:
        assert RunSettings(rounds=rounds, policy=policy)
    else:
        with pytest.raises(ValidationError, match="would ever be used"):
            RunSettings(rounds=rounds, policy=policy)


@pytest.mark.parametrize("change", [{"growth": 0}, {"limit": 0}, {"personal": "none"}])
def test_a_run_that_wants_no_mask_may_be_short(change):
    assert RunSettings(rounds=1, policy=Policy(**change))


# --- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_carry_their_name(name):
    assert preset(name).name == name
    assert preset_run(name, rounds=60).policy.name == name
    assert preset(name, growth=0.5).growth == 0.5
    assert preset(name, name="arm-b").name == "arm-b"


def test_what_the_presets_are():
    assert {name: preset(name).personal for name in PRESETS} == {
        "fedselect": "learned",
        "fedselect-official": "learned",
        "fisher": "learned",
        "fisher-gate": "learned",
        "shuffled": "learned",
        "random": "learned",
        "fedavg": "none",
        "fedavg-ft": "none",
        "ditto": "none",
        "local": "all",
        "share-then-local": "all",
        "fedper": "head",
        "fedper-late": "head",
        "fedrep": "head",
        "fedbabu": "head",
        "lg-fedavg": "body",
        "fedbn": "norm",
    }
    assert preset("random").score == "random"
    official = preset_run("fedselect-official", rounds=60)
    assert official.round.min_contributors == 1
    assert (official.training.epochs, official.training.steps) == (15, None)
    assert official.policy.limit_mode == "official"
    assert preset_run("fedselect", rounds=60).policy.start_round == 30


def test_presets_differ_from_fedselect_in_what_they_are_named_for_only():
    control = preset("random").model_dump() | {"name": "fedselect", "score": "delta"}
    assert control == preset("fedselect").model_dump()
    fisher = preset("fisher").model_dump()
    assert preset("shuffled").model_dump() == fisher | {"name": "shuffled", "shuffled": True}
    assert preset("fisher-gate").model_dump() == fisher | {"name": "fisher-gate", "gate": "holdout"}
    late = preset("fedper").model_dump() | {"name": "fedper-late"}
    assert late == preset("fedper-late").model_dump()


EARLIER = {"name", "personal", "score", "growth", "limit", "limit_mode", "interval", "start_round"}


@pytest.mark.parametrize("name", ["fedselect", "fedselect-official", "random", "fedavg", "fedper"])
def test_policies_of_earlier_releases_are_written_as_they_were(name):
    assert set(preset_run(name, rounds=60).policy.model_dump()) == EARLIER | {"schedule"}


def test_a_start_that_few_clients_reach_is_said():
    few = RoundPolicy(goal=4, over_selection=1)
    rule = preset_run("fedselect", rounds=60, round=few)  # first used in participation 32
    assert rule.warnings() == rule.warnings(4) == rule.warnings(7) == rule.warnings(0) == []
    (text,) = rule.warnings(20)
    assert "each takes part about 12.0 times" in text
    assert "first serves participation 32" in text
    assert preset_run("fedper", rounds=60, round=few).warnings(20) == []
    (text,) = preset_run("fedper-late", rounds=60, round=few).warnings(20)
    assert "first serves participation 31" in text


@FAST
@given(
    st.builds(
        Policy,
        personal=st.sampled_from(["learned", "head"]),
        fraction=st.sampled_from([None, 0.1]),
        interval=st.integers(1, 5),
        start_round=st.integers(0, 9),
        window=st.integers(1, 6),
    ),
    st.integers(0, 30),
)
def test_statistics_are_those_of_the_last_participations_before_a_choice(policy, number):
    due = [n for n in range(60) if policy.due(n)]
    nexts = [n for n in due if n >= number]
    assert policy.next_due(number) == (nexts[0] if nexts else None)
    assert policy.gathers(number) == bool(nexts and nexts[0] - number < policy.window)
    if policy.at_once:
        assert due == [max(policy.start_round, 1) - 1]


@pytest.mark.parametrize("name", sorted(LATE))
def test_presets_that_share_first_do_so_until_the_middle(name):
    assert preset(name).start_round == 0
    assert preset(name, rounds=61).start_round == 30
    assert preset_run(name, rounds=60).policy == preset(name, rounds=60)
    assert preset(name, rounds=60, start_round=7).start_round == 7


@pytest.mark.parametrize("personal", ["all", "head"])
def test_a_fixed_mask_that_waits_asks_for_agents_that_know_it(personal):
    at_once = Policy(personal=personal)
    assert "waits" not in at_once.model_dump()
    waiting = Policy(personal=personal, start_round=3)
    assert waiting.model_dump()["waits"] is True
    assert Policy.model_validate(waiting.model_dump()) == waiting
    assert "waits" not in Policy(personal="learned", start_round=3, waits=True).model_dump()
    with pytest.raises(ValidationError, match="would ever be used"):
        RunSettings(rounds=3, policy=waiting)


@pytest.mark.parametrize("personal", ["all", "head"])
def test_a_fixed_mask_that_waits_is_empty_before(personal):
    least, most = Policy(personal=personal, start_round=3).bounds(SPACE)
    assert least == Mask.initial(SPACE)
    assert most == Policy(personal=personal).bounds(SPACE)[0]
    assert Policy(personal=personal, start_round=3).first_mask(SPACE) == least
    assert Policy(personal=personal).first_mask(SPACE) == most


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(SettingsError, match="fedselect-official"):
        preset("fedprox")
    with pytest.raises(SettingsError):
        preset_run("fedprox", rounds=60)


def test_changes_win_over_the_preset():
    made = preset_run("fedselect-official", rounds=60, training=Training(steps=3))
    assert made.training.steps == 3
    assert made.round.min_contributors == 1


def test_a_goal_below_twice_k_warns():
    assert RunSettings(round=RoundPolicy(goal=4)).warnings() == []
    (warning,) = RunSettings(round=RoundPolicy(goal=3)).warnings()
    assert "stay frozen" in warning


def test_a_choice_before_its_score_knows_anything_warns():
    def texts(**policy):
        rule = RunSettings(round=RoundPolicy(goal=4), policy=Policy(score="drift", **policy))
        return rule.warnings()

    for start in (0, 1):
        (warning,) = texts(fraction=0.3, start_round=start)
        assert "start_round 2" in warning
    assert texts(fraction=0.3, start_round=2) == texts(growth=0.1) == []


def test_where_a_number_may_be_a_single_clients_it_is_said():
    for weighting in ("uniform", "examples"):
        alone = RoundPolicy(goal=4, min_contributors=1, weighting=weighting)
        texts = RunSettings(round=alone).warnings()
        assert len(texts) == 1 + (weighting == "examples")
        assert "published as it is" in texts[0]
    heavy = RunSettings(round=RoundPolicy(goal=4, weighting="examples"))
    (text,) = heavy.warnings()
    assert "influence.share_cap" in text
    assert heavy.model_copy(update={"influence": Influence()}).warnings() == []
    uncapped = heavy.model_copy(update={"influence": Influence(share_cap=False)})
    assert uncapped.warnings() == [text]


# --- bounds ------------------------------------------------------------------------------------

SPACE = ParameterSpace.of(
    [
        ("conv.weight", (4,), Kind.WEIGHT, Role.SELECTABLE),
        ("conv.bias", (2,), Kind.BIAS, Role.SHARED),
        ("bn.running_mean", (2,), Kind.BUFFER, Role.PERSONAL),
        ("frozen.weight", (3,), Kind.WEIGHT, Role.FROZEN),
        ("head.weight", (2,), Kind.WEIGHT, Role.SELECTABLE),
        ("head.bias", (1,), Kind.BIAS, Role.SHARED),
    ]
)


def where(mask: Mask) -> list[int]:
    return np.flatnonzero(mask.to_bool()).tolist()


@pytest.mark.parametrize(
    ("personal", "lower", "upper"),
    [
        ("learned", [6, 7, 8, 9, 10], [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]),
        ("none", [6, 7, 8, 9, 10], [6, 7, 8, 9, 10]),
        ("all", list(range(14)), list(range(14))),
        ("head", [6, 7, 8, 9, 10, 11, 12, 13], [6, 7, 8, 9, 10, 11, 12, 13]),
        ("body", [*range(11)], [*range(11)]),
    ],
)
def test_bounds(personal, lower, upper):
    least, most = Policy(personal=personal).bounds(SPACE)
    assert (where(least), where(most)) == (lower, upper)
    assert Mask.initial(SPACE) <= least <= most


def test_norm_layers_are_norms_with_their_shifts():
    rows = [(slot.name, slot.shape, slot.kind, slot.role) for slot in SPACE.slots]
    rows += [
        ("n.weight", (2,), Kind.NORM, Role.SELECTABLE),
        ("n.bias", (2,), Kind.BIAS, Role.SHARED),
    ]
    space = ParameterSpace.of([*rows, ("o.weight", (2,), Kind.WEIGHT, Role.SELECTABLE)])
    least, most = preset("fedbn").bounds(space)
    assert least == most
    assert where(least - Mask.initial(space)) == [14, 15, 16, 17]


@pytest.mark.parametrize("personal", ["body", "norm"])
def test_a_model_without_what_is_to_be_personal_is_refused(personal):
    space = ParameterSpace.of([("a.weight", (2,), Kind.WEIGHT, Role.SELECTABLE)])
    with pytest.raises(SpaceError, match="keep personal"):
        Policy(personal=personal).bounds(space)


def test_release_starts_from_all_that_may_be_chosen():
    policy = Policy(direction="release")
    assert policy.first_mask(SPACE) == policy.bounds(SPACE)[1]
    every = Policy(direction="release", elements="all").first_mask(SPACE)
    assert every == Mask.full(SPACE.dim)


def test_no_head_without_a_selectable_tensor():
    space = ParameterSpace.of([("a.bias", (2,), Kind.BIAS, Role.SHARED)])
    with pytest.raises(SpaceError, match="no selectable"):
        Policy(personal="head").bounds(space)


class Extended(Settings):
    """Settings as a later release may have them."""

    known: Whole = 1
    added: Whole = later(5, ge=0)


def test_a_later_setting_is_left_out_at_its_default_alone():
    assert Extended().model_dump() == {"known": 1}
    assert Extended(added=5).model_dump_json() == '{"known":1}'
    assert Extended(added=6).model_dump(mode="json") == {"known": 1, "added": 6}
    assert Extended.model_validate(Extended(added=6).model_dump()) == Extended(added=6)
    assert Extended.model_validate({"known": 1}) == Extended()
    with pytest.raises(ValidationError, match="greater than or equal"):
        Extended(added=-1)
