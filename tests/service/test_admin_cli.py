"""``fedselect admin`` over the HTTP interface, against a real coordinator."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import safetensors.numpy

from fedselect import remote, wire
from fedselect.administration import Administration
from fedselect.errors import FedSelectError
from fedselect.operations import Operations, listing, operation
from fedselect.profiles import Profile, Profiles, read_profiles, write_profiles

from .campaign import Campaign
from .factories import deliver, drain, make_clients, make_model, make_run, make_space
from .rolling import World

SERVER = "http://coordinator"


@pytest.fixture
def admin(terminal):
    """Run ``fedselect admin …``; what it prints as JSON, if it is to."""
    return partial(terminal, "admin")


def keep_key(path: Path, key: str, mode: int = 0o600) -> Path:
    path.write_text(key + "\n")
    path.chmod(mode)
    return path


# --- what the commands do ----------------------------------------------------------------------


def test_who_am_i_and_projects(admin, project):
    assert admin("whoami", "--json")["role"] == "owner"
    (found,) = admin("projects", "list", "--json")
    assert found["id"] == str(project.id)
    assert found["name"] in admin("projects", "show", project.id)


def test_a_key_of_an_organisation_names_its_project(admin, project, monkeypatch, asked):
    monkeypatch.setenv("FEDSELECT_KEY", project.organisation().key)
    made = admin("projects", "create", "second", "--client-limit", 3, "--json")
    assert (made["name"], made["client_limit"]) == ("second", 3)
    changed = admin("projects", "edit", made["id"], "--no-limit", "--name", "third", "--json")
    assert (changed["name"], changed["client_limit"]) == ("third", None)
    assert admin("runs", "list", code=1).exception.code == "project_required"
    assert admin("runs", "list", "--project", made["id"], "--json") == []
    assert asked[-1][1]["fedselect-project"] == made["id"]
    assert admin("runs", "list", "--project", "x", code=1).exception.code == "project_invalid"
    found = admin("keys", "create-for-organisation", "--role", "auditor", "--json")
    assert found["info"]["project_id"] is None


def test_clients(admin, project):
    client = make_clients(project, 1)[0]
    assert len(admin("clients", "enrol", "--count", 2, "--json")["tokens"]) == 2
    assert client.name in admin("clients", "list")
    changed = admin("clients", "edit", client.id, "--tag", "a", "--tag", "b", "--json")
    assert (changed["name"], changed["tags"]) == (client.name, ["a", "b"])
    assert admin("clients", "edit", client.id, "--no-tags", "--json")["tags"] == []
    assert admin("clients", "suspend", client.id, "--json")["state"] == "suspended"
    assert admin("clients", "activate", client.id, "--json")["state"] == "active"
    assert admin("clients", "revoke", client.id, "--json")["state"] == "revoked"
    admin("clients", "erase", client.id, code=1, text="n\n")
    assert admin("clients", "show", client.id, "--json")["name"] == client.name
    assert admin("clients", "erase", client.id, "--yes", "--json")["pseudonym"]


def test_conduct(admin, project):
    make_run(project, goal=2, quorum=1, influence={"strikes": 3})
    bad, _ = make_clients(project, 2)
    deliver(bad, bad.assignment(), b"not an update at all")
    drain(project)
    whole = admin("clients", "conduct", bad.id, "--json")
    assert (whole["state"], whole["forgiven_at"]) == ("active", None)
    ((run,), (strike,)) = whole["runs"], whole["runs"][0]["strikes"]
    assert (run["count"], run["limit"], strike["round"]) == (1, 3, 1)
    assert strike["reason"]
    shown = str(admin("clients", "conduct", bad.id))
    assert run["run"] in shown
    assert strike["reason"] not in shown, "the table counts; JSON says why"


def test_keys(admin, tmp_path):
    made = admin("keys", "create", "--role", "viewer", "--name", "wall", "--json")
    assert made["key"].startswith("fsk_")
    key_id = made["info"]["id"]
    assert "wall" in admin("keys", "list")
    assert made["key"] not in admin("keys", "list", "--json").__repr__()
    file = tmp_path / "new.key"
    info = admin("keys", "rotate", key_id, "--grace", 60, "--out", file, "--json")
    assert "key" not in info
    assert file.read_text().startswith("fsk_")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "new file" in admin("keys", "rotate", key_id, "--out", file, code=2).output
    assert admin("keys", "revoke", key_id, "--json")["revoked_at"]
    assert admin("keys", "create", "--role", "king", code=1).exception.code == "request_invalid"
    own = admin("keys", "rotate-own", "--json")
    assert own["info"]["predecessor_id"]


def test_a_key_is_bound_and_narrowed_when_it_is_made(admin, project, monkeypatch):
    words = ("keys", "create", "--role", "viewer", "--json")
    made = admin(*words, "--scope", "round:read", "--certificate", "ab" * 32)["info"]
    assert (made["scopes"], made["certificate"]) == (["round:read"], "ab" * 32)
    refused = admin(*words, "--organisation", code=1).exception
    assert refused.code == "organisation_key_needed"
    monkeypatch.setenv("FEDSELECT_KEY", project.organisation().key)
    made = admin(*words, "--organisation", "--scope", "round:read")["info"]
    assert (made["project_id"], made["scopes"]) == (None, ["round:read"])


def test_every_call_of_an_administrator_is_a_command():
    """Each command is one call, by its name. Agents and auditors have commands of their own."""
    elsewhere = {
        *("register", "check_in", "reserve_update", "put_file", "complete", "evaluate", "ablate"),
        *("decline", "ledger_entries", "ledger_keys", "checkpoint", "make_estimate"),
        *("prove_consistency", "prove_inclusion"),
    }
    calls = {
        name
        for owner in (Operations, Administration)
        for name, found in vars(owner).items()
        if isinstance(found, operation | listing)
    }
    modules = Path(remote.__file__).parent.glob("admin*.py")
    used = set(re.findall(r"client\.(\w+)\(", "".join(each.read_text() for each in modules)))
    assert calls - used == elsewhere


def test_webhooks(admin, project):
    url = "https://example.org/hook"
    made = admin("webhooks", "create", "--url", url, "--event", "round.published", "--json")
    assert made["secret"].startswith("whsec_")
    hook = made["webhook"]["id"]
    assert made["secret"] not in repr(admin("webhooks", "list", "--json"))
    assert "example.o" in admin("webhooks", "list")
    assert admin("webhooks", "show", hook, "--json")["events"] == ["round.published"]
    changed = admin("webhooks", "edit", hook, "--event", "client.harmed", "--json")
    assert (changed["events"], changed["url"]) == (["client.harmed"], url)
    assert admin("webhooks", "edit", hook, "--state", "disabled", "--json")["state"] == "disabled"
    assert admin("webhooks", "edit", hook, "--state", "off", code=1).exception.code
    assert admin("webhooks", "rotate-secret", hook, "--json")["secret"] != made["secret"]
    assert admin("webhooks", "deliveries", hook, "--state", "dead", "--json") == []
    assert admin("webhooks", "retry", hook, code=1).exception.code == "not_found"
    assert admin("webhooks", "create", "--url", url, code=1).exception.code == "request_invalid"


def test_cohorts_channels_and_rollouts(admin, project, tmp_path):
    world = World(project, count=5)
    cohort = admin("cohorts", "create", "some", "--percent", 100, "--json")
    assert cohort["members"] == 5
    assert admin("cohorts", "show", cohort["id"], "--json") == cohort
    assert "some" in admin("cohorts", "list")
    assert len(admin("cohorts", "clients", cohort["id"], "--json")) == 5
    assert admin("cohorts", "create", "none", code=1).exception.code == "request_invalid"

    model, versions = world.model.id, [each["id"] for each in world.versions]
    why = ("--reason", "agreed", "--json")
    found = admin("channels", "set", model, "stable", versions[1], *why)
    assert (found["version"]["id"], found["reason"]) == (versions[1], "agreed")
    assert admin("channels", "show", model, "stable", "--json") == found
    one = admin(
        "cohorts", "create", "one", "--client", next(iter(world.clients.values())).name, "--json"
    )
    pilot = ("--cohort", one["id"], *why)
    admin("channels", "set", model, "pilot", versions[2], *pilot)
    assert len(admin("channels", "list", model, "--json")) == 2
    refusal = admin("channels", "roll-back", model, "pilot", *why, code=1)
    assert refusal.exception.code == "channel_without_previous"

    file = tmp_path / "rollout.json"
    file.write_text(json.dumps({"minimum": 2, "stages": [100], "gates": {"latency": 5}}))
    started = admin("rollouts", "start", "r", model, versions[2], "--settings", file, "--json")
    assert started["settings"]["gates"]["latency"] == 5
    assert "running" in admin("rollouts", "list")
    refusal = admin("rollouts", "promote", started["id"], *why, code=1)
    assert refusal.exception.code == "rollout_running"
    assert admin("rollouts", "hold", started["id"], *why)["state"] == "held"
    assert admin("rollouts", "roll-back", started["id"], *why)["state"] == "rolled_back"
    assert len(admin("rollouts", "show", started["id"], "--json")["decisions"]) == 3


def test_members_need_an_identity_provider(admin):
    assert admin("members", "list", "--json") == []
    refused = admin("members", "add", "sub-1", "--role", "viewer", code=1)
    assert refused.exception.code == "no_issuer"
    assert admin("members", "end", uuid4(), code=1).exception.code == "not_found"


def test_a_model_and_a_run(admin, project, tmp_path):
    space = make_space()
    file = tmp_path / "space.json"
    file.write_text(json.dumps(space.to_json()))
    model = admin("models", "create", "watch", file, "--json")
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(wire.encode_version(space.digest, make_model(project).weights))
    sent = admin("models", "send-weights", model["id"], weights, "--json")
    assert sent["state"] == "uploaded"
    (job,) = admin("jobs", "list", "--state", "due", "--json")
    assert admin("jobs", "show", job["id"], "--json") == job
    assert admin("jobs", "retry", job["id"], "--json")["state"] == "due"
    drain(project)
    assert admin("models", "show-upload", sent["id"], "--json")["state"] == "accepted"
    assert admin("models", "show", model["id"], "--json")["initial_version"]
    assert "watch" in admin("models", "list")
    settings = tmp_path / "settings.json"
    settings.write_text('{"rounds": 60}')
    run = admin("runs", "create", "autumn", model["id"], "--settings", settings, "--json")
    assert run["settings"]["rounds"] == 60
    for order, state in (("start", "running"), ("pause", "paused"), ("resume", "running")):
        assert admin("runs", order, run["id"], "--json")["state"] == state
    (found,) = admin("rounds", "list", run["id"], "--json")
    assert admin("rounds", "show", found["id"], "--json")["assignments"] == []
    assert "autumn" in admin("runs", "list")
    assert len(admin("runs", "versions", run["id"], "--json")) == 1
    assert admin("runs", "evaluations", run["id"], "--json") == []
    page, table = tmp_path / "report.html", tmp_path / "report.csv"
    said = admin("runs", "report", run["id"], "--html", page, "--csv", table)
    assert "The run is running" in said
    assert "May we roll out?" in page.read_text()
    assert table.read_text().startswith("client_id,name,")
    assert admin("runs", "report", run["id"], "--json")["format"] == "fedselect-report/1"
    nowhere = tmp_path / "no" / "report.html"
    refused = admin("runs", "report", run["id"], "--html", nowhere, code=1)
    assert refused.exception.code == "file_invalid"
    assert admin("rounds", "cancel", found["id"], "--json")["state"] == "cancelled"
    assert admin("runs", "stop", run["id"], "--json")["state"] == "stopped"
    assert admin("runs", "show", run["id"], "--json")["state"] == "stopped"
    settings.write_text('{"rounds": -2}')
    refused = admin("runs", "create", "x", model["id"], "--settings", settings, code=1)
    assert "rounds" in str(refused.exception)


def test_what_others_wrote_does_not_steer_the_terminal(admin, project):
    admin("keys", "create", "--role", "viewer", "--name", "[red]x[/red] \u202e", "--json")
    listed = admin("keys", "list")
    assert "[red]x[/red]" in listed
    assert "\u202e" not in listed


def test_versions_are_looked_at_and_taken_along(admin, project, tmp_path):
    campaign = Campaign(project, rounds=2, published=1)
    version = campaign.versions()[-1]["id"]
    shown = next(each for each in campaign.rounds() if each["manifest_sha256"])
    assert admin("rounds", "manifest", shown["id"], "--json")["sha256"] == shown["manifest_sha256"]
    file, card = tmp_path / "model.safetensors", tmp_path / "card.md"
    admin("versions", "export", version, file)
    tensors = safetensors.numpy.load(file.read_bytes())
    assert {name: t.shape for name, t in tensors.items()} == {
        slot.name: slot.shape for slot in campaign.model.space.slots
    }
    assert admin("versions", "show", version, "--json")["id"] == version
    assert len(admin("versions", "lineage", version, "--json")["steps"]) == 3
    found = admin("versions", "diff", version, "--json")
    assert found["base_id"] == admin("versions", "show", version, "--json")["parent_id"]
    again = admin("versions", "diff", version, "--base", version, "--json")
    assert (again["total"]["changed"], found["total"]["changed"] > 0) == (0, True)
    text = admin("versions", "card", version, "--json")["markdown"]
    admin("versions", "write-card", version, card)
    assert card.read_text() == text
    space = admin("versions", "space", campaign.model.id, "--json")
    assert space["digest"] == campaign.model.space.digest
    estimated = admin("runs", "estimate", campaign.run["id"], "--json")
    assert estimated["actual"]["rounds"] == 1


def test_refusals_have_a_code_and_a_usage_error_is_another(admin):
    nobody = "00000000-0000-4000-8000-000000000000"
    assert admin("runs", "show", nobody, code=1).exception.code == "not_found"
    admin("runs", "show", "seven", code=2)
    admin("runs", "fly", code=2)


# --- where to, and as whom ---------------------------------------------------------------------


def test_a_key_is_never_taken_from_the_command_line(admin):
    found = admin("runs", "list", "--key", "fsk_x", code=2)
    assert "--key-file" in found.output


def test_profiles(admin, project, tmp_path, monkeypatch, asked):
    key = keep_key(tmp_path / "a.key", project.caller("viewer").key)
    words = ["--server", "http://elsewhere", "--key-file", key]
    admin("profiles", "set", "clinic", *words, "--default")
    admin("profiles", "set", "other", "--server", "http://coordinator", "--key-file", key)
    listed = admin("profiles", "list", "--json")
    assert [(p["name"], p["default"]) for p in listed] == [("clinic", True), ("other", False)]
    # Named: its server and its key, whatever the environment says.
    assert admin("whoami", "--profile", "clinic", "--json")["role"] == "viewer"
    assert asked[-1][0] == "http://elsewhere"
    # Not named: the environment, then the default.
    assert admin("whoami", "--json")["role"] == "owner"
    assert asked[-1][0] == "http://coordinator"
    monkeypatch.delenv("FEDSELECT_KEY")
    monkeypatch.delenv("FEDSELECT_SERVER")
    assert admin("whoami", "--json")["role"] == "viewer"
    monkeypatch.setenv("FEDSELECT_PROFILE", "other")
    admin("whoami", "--json")
    assert asked[-1][0] == "http://coordinator"
    admin("profiles", "remove", "other")
    assert admin("whoami", code=1).exception.code == "profile_unknown"
    admin("profiles", "remove", "clinic")
    assert read_profiles(tmp_path / "profiles.toml") == Profiles()


def test_a_profile_s_key_goes_to_no_other_server(admin, project, tmp_path, asked):
    key = keep_key(tmp_path / "a.key", project.owner.key)
    admin("profiles", "set", "clinic", "--server", "http://elsewhere", "--key-file", key)
    found = admin("whoami", "--profile", "clinic", "--server", SERVER, code=1)
    assert found.exception.code == "key_missing"
    assert not asked


def test_a_key_that_others_can_read_is_refused(admin, project, tmp_path):
    key = keep_key(tmp_path / "a.key", project.owner.key, 0o644)
    assert admin("whoami", "--key-file", key, code=1).exception.code == "key_exposed"
    missing = admin("whoami", "--key-file", tmp_path / "none", code=1)
    assert missing.exception.code == "key_missing"


def test_the_local_stack_is_found_where_nothing_is_named(admin, project, tmp_path, monkeypatch):
    monkeypatch.delenv("FEDSELECT_KEY")
    monkeypatch.delenv("FEDSELECT_SERVER")
    monkeypatch.setattr(remote, "LOCAL", tmp_path / "local.toml")
    assert admin("whoami", code=1).exception.code == "server_missing"
    key = keep_key(tmp_path / "owner.key", project.owner.key)
    write_profiles(remote.LOCAL, Profiles("local", {"local": Profile(SERVER, str(key))}))
    assert admin("whoami", "--json")["role"] == "owner"


@pytest.mark.parametrize(
    "text", ["[", "profiles = 1", "[profiles.x]\nkey = 1", '[profiles.x]\nserver = ["a"]', "\xff"]
)
def test_a_broken_file_is_explained(text, admin, tmp_path):
    (tmp_path / "profiles.toml").write_bytes(text.encode("latin-1"))
    assert admin("profiles", "list", code=1).exception.code == "profile_invalid"


def test_odd_names_survive_in_the_file(tmp_path):
    file = tmp_path / "deep" / "profiles.toml"
    profiles = Profiles('a"b', {'a"b': Profile("https://x", "/ä ö", None), "c.d": Profile("y")})
    write_profiles(file, profiles)
    assert read_profiles(file) == profiles


def test_the_shell_completes():
    words = {"_FEDSELECT_COMPLETE": "complete_bash", "COMP_WORDS": "fedselect admin ru"}
    found = subprocess.run(
        [Path(sys.executable).with_name("fedselect")],
        env={**os.environ, **words, "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout.split() == ["runs"]


def test_errors_are_of_one_kind(admin, monkeypatch):
    monkeypatch.setenv("FEDSELECT_SERVER", "ftp://x")
    assert isinstance(admin("whoami", code=1).exception, FedSelectError)


def test_arms_by_name_and_their_comparison(admin, project, tmp_path):
    model = make_model(project)
    names = ("fedselect", "share-then-local", "fedavg")
    words = [word for name in names for word in ("--arm", name)]
    run = admin("runs", "create", "pilot", model.id, *words, "--json")
    assert [arm["name"] for arm in run["arms"]] == list(names)
    assert run["arms"][1]["policy"]["start_round"] == run["settings"]["rounds"] // 2
    page, lines = tmp_path / "arms.html", tmp_path / "arms.csv"
    said = admin("runs", "compare", run["id"], "--html", page, "--csv", lines)
    assert "arms are judged when" in " ".join(said.split())
    assert "<svg" not in page.read_text()
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert lines.read_bytes().startswith(b"client_id,name,arm")
    found = admin("runs", "compare", run["id"], "--json")
    assert found["recommendation"]["policy"] is None
    assert admin("runs", "create", "x", model.id, "--arm", "none", code=1).exception.code == (
        "settings_invalid"
    )
    assert admin("runs", "report", run["id"], "--arm", "fedavg", "--json")["run"]["policy"] == (
        "fedavg"
    )
