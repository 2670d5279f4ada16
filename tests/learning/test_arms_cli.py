"""`fedselect compare`: several policies in one process, with the service's own figures."""

from typer.testing import CliRunner

from fedselect.cli import build
from fedselect.comparedoc import Comparison
from fedselect.errors import SettingsError
from fedselect.policies import Arms, RunSettings, preset
from fedselect.simulate import simulate_arms
from fedselect.tasks import client_tasks


def ask(*words, code=0):
    found = CliRunner().invoke(build("compare"), ["compare", *map(str, words)])
    assert found.exit_code == code, (found.output, found.exception)
    return found.exception if code else found.stdout


def test_it_says_what_the_simulation_scored(tmp_path):
    page = tmp_path / "arms.html"
    words = ["--arm", "fedavg", "--arm", "random", "--rounds", 4, "--html", page]
    found = Comparison.model_validate_json(ask(*words, "--json"))
    policies = (preset("fedavg", rounds=4), preset("random", rounds=4))
    settings = RunSettings(rounds=4, arms=Arms(policies=policies))
    result = simulate_arms(client_tasks("digits", seed=0), settings)
    for arm in found.arms:
        scores = [each["post"] for each in result[arm.name].scores.values()]
        assert arm.pooled.correct == sum(score.correct for score in scores)
        assert arm.clients == len(scores)
    assert (found.recommendation.policy, found.recommendation.short) == ("fedavg", True)
    assert "random (control)" in page.read_text()


def test_its_table_and_reasons(tmp_path):
    said = ask("--arm", "fedavg", "--arm", "fedper", "--rounds", 2)
    assert "short trial" in said
    assert "fedper" in said


def test_what_it_refuses(tmp_path):
    assert isinstance(ask("--arm", "nothing", code=1), SettingsError)
    assert "names that differ" in str(ask("--arm", "local", "--arm", "local", code=1))
    nowhere = tmp_path / "no" / "page"
    assert ask("--html", nowhere, "--arm", "local", "--rounds", 2, code=1).code == "file_invalid"
