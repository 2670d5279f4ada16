"""The guided pilot's demo, smaller, on real processes: a good version goes out, a bad one back."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import fedselect
from fedselect.pilotfile import parse

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).parents[2] / "examples"
SITES, ROUNDS = 6, 24


@pytest.fixture(scope="module")
def scenario(demo_module):
    """``examples/pilot.py``, which imports the demo beside it."""
    spec = importlib.util.spec_from_file_location("pilot_demo", EXAMPLES / "pilot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pilot_demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def told(scenario, product):
    """What the demo printed, and whether it ended as it should."""
    with scenario.prepared(product.root, product.environment(), SITES) as here:
        here.rounds = ROUNDS
        ended = scenario.tour(here)
        rollouts = {
            each.name: here.demo.admin.rollout(each.id) for each in here.demo.admin.rollouts()
        }
        yield here, ended, rollouts


def test_it_ends_as_it_should(told):
    here, ended, rollouts = told
    assert ended, "\n".join(here.said)
    assert {name: each.state.value for name, each in rollouts.items()} == {
        "wards": "promoted",
        "hasty": "rolled_back",
    }


def test_the_bad_version_was_held_by_a_gate_and_not_by_chance(told):
    (judged,) = told[2]["hasty"].judgements
    assert (judged.stage, judged.verdict.value) == (1, "fail")
    assert {gate.gate for gate in judged.gates if gate.verdict.value == "fail"} == {"harmed_share"}


def test_every_decision_has_its_reason_in_the_ledger(told):
    for rollout in told[2].values():
        assert all(each.reason for each in rollout.decisions)
    assert told[2]["hasty"].decisions[-1].reason == "it harms the sites that have it"


def test_only_the_pilot_s_sites_trained(told):
    here, _, rollouts = told
    run = next(each for each in here.demo.admin.runs() if each.name == "wards")
    names = {each.client_name for each in here.demo.admin.evaluations(run.id)}
    assert names == set(list(here.demo.sites)[:3])
    assert rollouts["wards"].version_id in {v.id for v in here.demo.admin.versions(run.id)}


def test_report_and_file_are_left_for_people(told):
    here, _, _ = told
    page = (here.place / "wards.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg") >= 7
    file = here.place / "wards.yaml"
    assert parse(file.read_text(), file.name).rounds == ROUNDS
    text = "\n".join(here.said)
    for word in ("Gained:", "Lost:", "Cost:", "Personal:", "Gates:", "insufficient"):
        assert word in text
    assert here.environment["FEDSELECT_KEY"] not in text


def test_a_site_of_the_pilot_serves_its_own_model(told):
    here, _, _ = told
    run = next(each for each in here.demo.admin.runs() if each.name == "wards")
    folder = here.demo.folder(next(iter(here.demo.sites)))
    served = fedselect.load_personalized(folder, arm=run.arm_id)
    assert served.participations == ROUNDS
