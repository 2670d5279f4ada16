"""The objectives of docs/SLO.md, computed from a real ``/metrics`` before and after a run.

Once by an evaluation of the few forms that the queries have, and where there is a Prometheus by a
real one that scrapes a coordinator which listens, with the rules of ``deploy/``.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from app import gauges
from app.main import create_app
from app.wiring import Coordinator
from workers import sweep

from .campaign import Campaign
from .factories import Project

ROOT = Path(__file__).parents[2]
TOKEN = "a token for the objectives"
QUERY = re.compile(r"^(\w+)[:;][^\n]*\n+```promql\n(.*?)```", re.MULTILINE | re.DOTALL)
RISE = re.compile(r"sum\(increase\((\w+)(?:\{(.*?)\})?\[30d\]\)\)")
SHARE = re.compile(r"avg_over_time\(\(max\((\w+)\) < bool (\d+)\)\[30d:1m\]\)")
RATIO = re.compile(r"(1 - )?([\d.]+)(?:\s*/\s*([\d.]+))?")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
bell = threading.Event()  # never rung: its wait is a pause between two looks


def queries() -> dict[str, str]:
    return dict(QUERY.findall((ROOT / "docs/SLO.md").read_text()))


def samples(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def computed(query: str, before: Samples, after: Samples) -> float:
    """What a query of docs/SLO.md gives for two scrapes."""

    def rise(found: re.Match[str]) -> str:
        wanted = re.findall(r'(\w+)=(~?)"([^"]*)"', found[2] or "")
        total = 0.0
        for (name, labels), value in after.items():
            if name == found[1]:
                told = dict(labels)
                fits = all(re.fullmatch(v if t else re.escape(v), told[n]) for n, t, v in wanted)
                total += value - before.get((name, labels), 0) if fits else 0
        return f"{total:.0f}"

    def share(found: re.Match[str]) -> str:
        values = [value for (name, _), value in after.items() if name == found[1]]
        return "1" if max(values) < float(found[2]) else "0"

    text = SHARE.sub(share, RISE.sub(rise, query))
    text = re.sub(r"\((\d+) or vector\(0\)\)", r"\1", text).strip()
    ratio = RATIO.fullmatch(text)
    assert ratio is not None, f"this evaluation does not know the form {text!r}"
    value = float(ratio[2]) / float(ratio[3] or 1)
    return 1 - value if ratio[1] else value


@dataclass(frozen=True)
class Watched:
    """A coordinator that listens and may be scraped."""

    project: Project
    port: int

    def metrics(self) -> str:
        ask = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        return fetched(ask)

    def work(self) -> None:
        """A run of two rounds, from the first call to the sealed ledger."""
        Campaign(self.project, rounds=2, published=2)
        sweep.seal(self.project.core)


def fetched(ask: Any) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(ask, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.fixture
def watched(
    core: Coordinator, project: Project, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Watched]:
    monkeypatch.setattr(gauges, "KEPT", 0.0)
    sweep.seal(core)  # what other tests have left
    settings = core.settings.model_copy(update={"metrics_token": SecretStr(TOKEN)})
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.05)
    yield Watched(project, server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(10)


def check(values: dict[str, float]) -> None:
    assert set(values) == {"Availability", "Latency", "Verification", "Publication", "Evidence"}
    assert values.pop("Evidence") == 1
    assert values.pop("Availability") == 1, "a run has no 5xx"
    # How fast it was is the machine's business: a share, and of something.
    assert all(0 < value <= 1 for value in values.values()), values


def test_every_objective_is_computed_from_a_run(watched: Watched) -> None:
    before = samples(watched.metrics())
    watched.work()
    after = samples(watched.metrics())
    check({name: computed(query, before, after) for name, query in queries().items()})


def test_what_is_too_slow_or_broken_counts(watched: Watched) -> None:
    before = samples(watched.metrics())
    told = frozenset({("status", "503"), ("method", "GET"), ("route", "/v1/me")})
    name = "fedselect_http_request_duration_seconds"
    slow = frozenset({*told, ("le", "1.0")})
    extra = {(f"{name}_count", told): 4.0, (f"{name}_bucket", slow): 1.0}
    found = {
        k: computed(q, before, {**before, **extra}) for k, q in queries().items() if k[0] in "AL"
    }
    assert found == {"Availability": 0.0, "Latency": 0.25}


# --- by a real Prometheus -----------------------------------------------------------------------


@pytest.fixture
def prometheus(watched: Watched, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Ask a Prometheus that scrapes the coordinator; it has the rules of ``deploy/``."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: the queries were computed by this file alone")
    scrape = {
        "job_name": "fedselect-api",
        "authorization": {"credentials": TOKEN},
        "static_configs": [{"targets": [f"127.0.0.1:{watched.port}"]}],
    }
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "rule_files": [str(ROOT / "deploy/prometheus/alerts.yaml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path / 'prometheus.yaml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=said,
            stderr=said,
        )

    def ask(path: str) -> Any:
        try:
            return json.loads(fetched(f"http://127.0.0.1:{port}/api/v1/{path}"))["data"]
        except urllib.error.URLError:
            assert process.poll() is None, (tmp_path / "said").read_text()
            return None

    yield ask
    process.terminate()
    process.wait(30)


def asked(prometheus: Callable[[str], Any], query: str, *, ahead: float = 0) -> float | None:
    """The one value of a query, None while there is none."""
    moment = prometheus("query?" + urllib.parse.urlencode({"query": "time()"}))
    if moment is None:
        return None
    at = float(moment["result"][0]) + ahead
    found = prometheus("query?" + urllib.parse.urlencode({"query": query, "time": at}))["result"]
    assert len(found) <= 1, found
    return float(found[0]["value"][1]) if found else None


def wait(done: Callable[[], object]) -> None:
    for _ in range(600):
        if done():
            return
        bell.wait(0.1)
    pytest.fail("nothing happened for a minute")


def test_prometheus_says_the_same(watched: Watched, prometheus: Callable[[str], Any]) -> None:
    wait(lambda: asked(prometheus, "max(fedselect_database_up)") == 1)
    watched.work()
    published = 'sum(increase(fedselect_job_turnaround_seconds_count{kind="publish"}[30d]))'
    wait(lambda: asked(prometheus, published))
    # A minute ahead there is a full minute for the subquery, whenever the test began.
    found = {n: asked(prometheus, query, ahead=60) for n, query in queries().items()}
    assert None not in found.values(), found
    check({name: value for name, value in found.items() if value is not None})
    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 5
    assert not [rule for rule in rules if rule.get("lastError")]
