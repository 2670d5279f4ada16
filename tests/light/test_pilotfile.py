"""The run file of a pilot: what it says comes back, what is wrong is told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.cohortdocs import CohortRule
from fedselect.errors import FedSelectError
from fedselect.pilotfile import FORMAT, PilotFile, Rollout, parse, schema, write
from fedselect.policies import PRESETS, RoundPolicy, Training
from fedselect.rolloutdocs import Gates

SHORT = f"""\
format: {FORMAT}
name: ward-pilot
model: watch-cnn
cohort:
  clients: [site-01, site-02, site-03]
"""
ROOT = Path(__file__).parents[2]


def wrong(text: str) -> str:
    with pytest.raises(FedSelectError) as caught:
        parse(text, "pilot.yaml")
    assert caught.value.code == "pilot_file_invalid"
    assert str(caught.value).startswith("pilot.yaml: line ")
    return str(caught.value)


# --- what comes back ---------------------------------------------------------------------------


def test_a_short_file_is_enough():
    found = parse(SHORT, "pilot.yaml")
    assert found.cohort.clients == ["site-01", "site-02", "site-03"]
    settings = found.settings()
    assert (settings.rounds, settings.policy.name, settings.policy.start_round) == (
        30,
        "fedselect",
        15,
    )
    assert settings.training.steps == 20


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
cohorts = st.one_of(
    st.lists(names, min_size=1, max_size=4).map(lambda each: CohortRule(clients=each)),
    names.map(lambda each: CohortRule(tag=each)),
    st.floats(0.01, 100).map(lambda each: CohortRule(percent=each)),
)


@settings(max_examples=40)
@given(
    st.builds(
        PilotFile,
        format=st.just(FORMAT),
        name=names,
        profile=st.none() | names,
        project=st.none() | st.uuids(),
        model=names,
        cohort=cohorts,
        policies=st.lists(st.sampled_from(sorted(PRESETS)), min_size=1, max_size=3, unique=True),
        compare=st.sampled_from(["parallel", "randomized"]),
        rounds=st.integers(8, 1000),
        seed=st.integers(0, 2**63 - 1),
        training=st.builds(
            Training,
            steps=st.integers(2, 1000),
            learning_rate=st.floats(1e-9, 100),
            clip_norm=st.none() | st.floats(1e-9, 1e9),
        ),
        round=st.builds(
            RoundPolicy,
            goal=st.integers(5, 50),
            quorum=st.integers(1, 5),
            report_deadline=st.floats(0.1, 9999),
        ),
        encoding=st.sampled_from(["f32", "bf16", "int8"]),
        link=st.sampled_from(["10mbit", "50mbit/10mbit", "dsl", "4g"]),
        rollout=st.builds(
            Rollout,
            stages=st.sampled_from([[100.0], [5.0, 25.0, 100.0], [0.5, 100.0]]),
            minimum=st.integers(1, 9),
            automatic=st.booleans(),
            gates=st.builds(
                Gates,
                baseline=st.sampled_from(["before", "local_only", "start"]),
                mean_gain=st.none() | st.floats(-100, 100),
                latency=st.none() | st.floats(0.1, 1e6),
            ),
        ),
    ),
    st.lists(st.from_regex(r"[a-z #:%é]{0,40}", fullmatch=True), max_size=3),
)
def test_what_is_written_is_read_back_the_same(file, notes):
    text = write(file, notes=notes)
    assert parse(text, "pilot.yaml") == file


def test_words_that_other_readers_take_for_more_are_quoted():
    text = write(parse(SHORT.replace("ward-pilot", "'no'"), "pilot.yaml"))
    assert 'name: "no"' in text
    assert parse(SHORT.replace("ward-pilot", "'1e5'"), "x").name == "1e5"


def test_every_setting_of_the_written_file_is_explained():
    file = parse(SHORT, "pilot.yaml").model_copy(
        update={"project": UUID(int=5), "profile": "clinic", "policies": ["fedselect", "fedavg"]}
    )
    lines = write(file, notes=["It costs little."]).splitlines()
    assert "# It costs little." in lines
    named = [n for n, line in enumerate(lines) if line[:1].isalpha() and "format" not in line]
    assert {lines[n].partition(":")[0] for n in named} == set(PilotFile.model_fields) - {"format"}
    assert all(lines[n - 1].startswith("# ") for n in named)
    assert max(map(len, lines)) <= 110


def test_the_committed_schema_is_that_of_the_code():
    assert (ROOT / "docs" / "pilot.schema.json").read_text() == schema(), "renew it: make openapi"
    assert json.loads(schema())["properties"]["rounds"]["minimum"] == 1


# --- what is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "line", "words"),
    [
        (("name: ward-pilot\n", ""), 1, "name is missing: Of the pilot"),
        (("watch-cnn", "watch cnn"), 3, 'model is "watch cnn": string should match'),
        (("watch-cnn", "2026"), 3, "model is 2026: input should be a valid string"),
        (("cohort:", "cohorts:"), 4, "cohorts is no setting; did you mean cohort?"),
        (("  clients", "  client"), 5, "cohort.client is no setting; did you mean clients?"),
        (("[site-01, site-02, site-03]", "[]"), 5, "cohort.clients: list should have at least 1"),
        (("[site-01, site-02, site-03]", "[site 1]"), 5, 'cohort.clients.0 is "site 1"'),
        (("  clients: [site-01, site-02, site-03]", "  percent: 101"), 5, "less than or equal"),
        (("  clients:", "  tag: a\n  clients:"), 4, "give one of clients, tag and percent, not 2"),
        (("cohort:\n", "rounds: 0\ncohort:\n"), 4, "rounds is 0: input should be greater"),
        (("cohort:\n", 'rounds: "9"\ncohort:\n'), 4, 'rounds is "9": input should be a valid int'),
        (("cohort:\n", "link: fast\ncohort:\n"), 4, "'fast' is no link; write 10mbit"),
        (("cohort:\n", "policies: [fedsel]\ncohort:\n"), 4, "there is no policy 'fedsel'; there"),
        (("cohort:\n", "training: {step: 3}\ncohort:\n"), 4, "training.step is no setting; did"),
        (("cohort:\n", "round: {goal: 1, quorum: 2}\ncohort:\n"), 4, "quorum 2 is above goal 1"),
        (("cohort:\n", "rounds: 1\ncohort:\n"), 1, "no mask of fedselect would ever be used"),
        (("format: fedselect-pilot/1", "format: 2"), 1, "format is 2: input should be 'fedselect-"),
        (("cohort:\n", "rollout:\n  stages: [5, 3]\ncohort:\n"), 4, "stages must rise"),
        (("cohort:\n", "rollout:\n  gates: {mean: 1}\ncohort:\n"), 5, "did you mean mean_gain?"),
        (("cohort:\n", "name: twice\ncohort:\n"), 4, "name is there twice"),
        (("cohort:\n", "cohort: [\n"), 6, ""),
    ],
)
def test_a_mistake_is_told_with_line_value_and_what_to_do(changed, line, words):
    text = SHORT.replace(*changed)
    assert text != SHORT
    found = wrong(text)
    assert f"line {line}: " in found
    assert words in found


def test_many_mistakes_are_told_at_once_but_not_all():
    found = wrong("\n".join(f"x{n}: 1" for n in range(9)))
    assert found.count("line ") == 5
    assert "and 8 more" in found  # four settings are missing, too


@pytest.mark.parametrize("text", ["", "[]", "5", "just words"])
def test_what_is_no_mapping_is_refused(text):
    assert "the file" in wrong(text)
