"""``/metrics``: who may read it, that it counts what happens, and that all names exist."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from app import exposition, gauges
from app.storage import S3Storage
from workers import sweep

from .campaign import Campaign
from .factories import Caller, ok
from .rolling import World

ROOT = Path(__file__).parents[2]
TOKEN = "a token for the monitoring"


@pytest.fixture
def asked(core, api, monkeypatch):
    """The samples of ``/metrics``, as {(name, labels): value}."""
    settings = core.settings.model_copy(update={"metrics_token": SecretStr(TOKEN)})
    api.app.state.core = replace(core, settings=settings)
    monkeypatch.setattr(gauges, "KEPT", 0.0)

    def ask() -> dict[tuple[str, frozenset], float]:
        answer = api.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == exposition.CONTENT_TYPE
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    yield ask
    api.app.state.core = core


def value(samples, name, **labels):
    return samples.get((name, frozenset(labels.items())), 0.0)


def denied(answer, status, code):
    """As every refusal, but of an operation that the interface's description leaves out."""
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_nobody_reads_metrics_unless_allowed(api, project):
    denied(api.get("/metrics"), 403, "metrics_off")
    denied(project.owner.get("/metrics"), 403, "metrics_off")


def test_only_the_token_opens_metrics(api, asked, project):
    assert asked()
    denied(api.get("/metrics"), 401, "key_missing")
    denied(project.owner.get("/metrics"), 401, "key_unknown")
    denied(Caller(api, "fsk_wrong").get("/metrics"), 401, "key_unknown")


def test_a_campaign_is_counted(asked, core, project):
    before = asked()
    Campaign(project, rounds=2, published=2)
    after = asked()

    def rise(name, **labels):
        return value(after, name, **labels) - value(before, name, **labels)

    assert rise("fedselect_rounds_total", outcome="published") == 2
    assert rise("fedselect_updates_total", outcome="accepted") == 4
    assert rise("fedselect_upload_bytes_total") > 0
    assert rise("fedselect_job_duration_seconds_count", kind="verify", outcome="done") == 5
    assert rise("fedselect_job_turnaround_seconds_count", kind="publish") == 2
    assert rise("fedselect_storage_call_duration_seconds_count", verb="stream") >= 5
    route = {"method": "POST", "route": "/v1/check-ins", "status": "200"}
    assert rise("fedselect_http_request_duration_seconds_count", **route) == 4
    assert value(after, "fedselect_database_up") == 1
    sweep.seal(core)
    assert value(asked(), "fedselect_ledger_unsealed_entries") == 0
    assert value(asked(), "fedselect_ledger_size_entries") > 0


def test_what_waits_is_seen(asked, clock, core, project):
    from .factories import contribute, make_clients, make_model, make_run

    model = make_model(project)
    make_run(project, model)
    contribute(make_clients(project, 1)[0], model)
    sweep.seal(core)
    contribute(make_clients(project, 1)[0], model)
    clock.advance(100)
    found = asked()
    assert value(found, "fedselect_jobs", kind="verify", state="due") >= 2
    assert 100 <= value(found, "fedselect_job_queue_age_seconds", kind="verify") < 10_000
    assert 100 <= value(found, "fedselect_ledger_sealing_lag_seconds") < 10_000


def test_rollouts_that_wait_for_somebody_are_seen(asked, project):
    world = World(project)
    world.set()
    before = asked()
    rollout = world.start()
    assert value(asked(), "fedselect_rollouts", state="running") >= 1
    ok(world.order(rollout, "hold"))
    held = [value(found, "fedselect_rollouts", state="held") for found in (before, asked())]
    assert held[1] == held[0] + 1


def test_a_path_that_is_none_is_one_label(api, asked):
    for path in ("/v1/nothing", "/v1/else"):
        api.get(path)
    api.request("BREW", "/v1/runs")
    names = {dict(labels).get("route") for _, labels in asked()}
    assert "unknown" in names
    assert not [n for n in names if n and ("nothing" in n or "else" in n)]
    methods = {dict(labels).get("method") for _, labels in asked()}
    assert "other" in methods
    assert "BREW" not in methods


def test_a_store_that_is_away_is_an_error_of_the_store(asked, core):
    from app import metrics
    from app.errors import Unavailable

    nowhere = core.settings.model_copy(update={"s3_endpoint": "http://127.0.0.1:9"})
    before = asked()
    with pytest.raises(Unavailable):
        metrics.observed(S3Storage(nowhere)).read("versions/none")
    with pytest.raises(Unavailable):
        list(metrics.observed(S3Storage(nowhere)).stream("versions/none"))
    for verb in ("read", "stream"):
        name = "fedselect_storage_errors_total"
        assert value(asked(), name, verb=verb) == value(before, name, verb=verb) + 1


def test_without_a_database_the_rest_is_still_told(core, monkeypatch):
    from sqlalchemy.exc import OperationalError

    def away(*_):
        raise OperationalError("", {}, Exception())

    collector = gauges.DatabaseCollector(core.db)
    monkeypatch.setattr(type(core.db), "transaction", away)
    (found,) = collector.collect()
    assert (found.name, found.samples[0].value) == ("fedselect_database_up", 0)


def test_a_port_of_its_own_asks_for_no_token(core):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with exposition.served("127.0.0.1", port, gauges.registry(core.db)):
            pass  # a taken port is a warning
    with exposition.served("127.0.0.1", port, gauges.registry(core.db)):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        text = opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    assert "fedselect_database_up 1.0" in text


# --- names -------------------------------------------------------------------------------------

NAME = re.compile(r"\bfedselect_[a-z0-9_]+")
SUFFIXES = ("_bucket", "_count", "_sum", "_total")


@pytest.fixture
def existing(core):
    """Every name that a query may use."""
    found = set()
    for family in gauges.registry(core.db).collect():
        if family.name.startswith("fedselect_"):
            found |= {sample.name for sample in family.samples} | {family.name}
            found |= {family.name + suffix for suffix in SUFFIXES if family.type == "histogram"}
            found |= {f"{family.name}_total"} if family.type == "counter" else set()
    return found


def _expressions() -> dict[str, str]:
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    found = {rule["alert"]: rule["expr"] for g in alerts["groups"] for rule in g["rules"]}
    board = json.loads((ROOT / "deploy/grafana/fedselect.json").read_text())
    for panel in board["panels"]:
        for number, target in enumerate(panel.get("targets", [])):
            found[f"{panel['title']} {number}"] = target["expr"]
    slo = (ROOT / "docs/SLO.md").read_text()
    for number, block in enumerate(re.findall(r"```promql\n(.*?)```", slo, re.DOTALL)):
        found[f"SLO {number}"] = block
    return found


@pytest.mark.parametrize("where", _expressions())
def test_every_metric_that_is_asked_for_exists(where, existing):
    names = set(NAME.findall(_expressions()[where]))
    assert names
    assert not names - existing


def test_promtool_accepts_the_rules():
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed: only the names in the rules were checked")
    for command, file in (("rules", "alerts.yaml"), ("config", "prometheus.yaml")):
        words = [tool, "check", command, str(ROOT / "deploy/prometheus" / file)]
        found = subprocess.run(words, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr


def test_every_metric_is_documented_and_well_named(existing):
    page = (ROOT / "docs/OBSERVABILITY.md").read_text()
    families = {f.name: f for f in REGISTRY.collect() if f.name.startswith("fedselect_")}
    for name, family in families.items():
        written = f"{name}_total" if family.type == "counter" else name
        assert f"`{written}`" in page, written
        assert family.type != "histogram" or name.endswith("_seconds")
    for name in ("fedselect_jobs", "fedselect_ledger_sealing_lag_seconds"):
        assert f"`{name}`" in page
