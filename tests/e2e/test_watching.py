"""After a whole run on real processes, nothing that was written down holds a live secret.

Looked through are all logs on DEBUG, the ledger, the documents of refused calls and every row of
the database, for keys, enrolment tokens, tokens of people, secrets of webhooks, signatures and the
settings that are secret.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import httpx
import numpy as np
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from service.factories import make_space, train
from service.provider import Provider, listening

from app import logs
from app.cli import prepare
from app.localstack import LocalStack
from fedselect import wire
from fedselect.client import Client, announce
from fedselect.hooks import WebhookCreate
from fedselect.policies import RunSettings
from fedselect.protocol import ModelCreate, Registration, RunCreate
from fedselect.tenancy import KeyCreate, KeyRotate, MemberCreate

pytestmark = pytest.mark.e2e
SIGNATURE = re.compile(r"X-Amz-Signature=([0-9a-f]{64})")
PRODUCT = ("coordinator", "worker", "scheduler")
RULES = {"goal": 2, "quorum": 2, "over_selection": 1, "retry_after": 1}
SETTINGS = {
    "rounds": 1,
    "policy": {"personal": "learned", "start_round": 0, "growth": 0},
    "training": {"steps": 2},
    "round": RULES,
}
bell = Event()  # never rung: its wait is a pause between two looks


class Witness:
    """Keeps every secret that a client is shown and every document of a refusal."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.secrets: set[str] = set()
        self.problems: list[str] = []

    def client(self, key: str | None) -> Client:
        if key is not None:
            self.secrets |= {key, key.split("_")[2]}
        return Client(self.url, key=key)

    def saw(self, text: str) -> None:
        self.secrets |= set(SIGNATURE.findall(text))

    def ask(self, method: str, path: str, key: str | None, **options) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=self.url, trust_env=False) as http:
            answer = http.request(method, path, headers=headers, **options)
        assert answer.status_code >= 400
        self.problems.append(answer.text)


@pytest.fixture(scope="module")
def provider():
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with listening(Provider(keys={"one": key})) as found:
        yield found


@pytest.fixture(scope="module")
def stack(environment, provider, tmp_path_factory):
    root = tmp_path_factory.mktemp("secrets")
    servers = {name: value for name, value in environment.items() if name != "PUBLIC_URL"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOG_FORMAT", "json")
        patch.setenv("LOG_LEVEL", "DEBUG")
        patch.setenv("METRICS_TOKEN", "the token of the monitoring")
        patch.setenv("OIDC_ISSUER", provider.issuer)
        patch.setenv("WEBHOOK_PRIVATE", "true")
        found = LocalStack(root, given=servers)
        try:
            found.up(prepare=lambda ready: prepare(root, ready))
            yield found
        finally:
            found.down()


@pytest.fixture(scope="module")
def witness(stack, provider) -> Witness:
    """A run of one round with two clients, and some calls that are refused."""
    seen = Witness(stack.environment()["PUBLIC_URL"])
    key = (stack.root / "owner.key").read_text()
    with seen.client(key) as owner:
        spare = owner.create_key(KeyCreate(role="auditor"))
        newer = owner.rotate_key(spare.info.id, KeyRotate())
        seen.client(spare.key).close()
        seen.client(newer.key).close()
        hook = tell(seen, owner, provider)
        people(seen, owner, provider)
        space, run = campaign(owner)
        tokens = owner.create_enrolments(3).tokens
        seen.secrets |= {t.split("_")[2] for t in tokens}
        for number in range(2):
            take_part(seen, tokens[number], f"site-{number}", space, seed=number)
        wait(lambda: owner.run(run.id).published == 1)
        provoke(seen, key, tokens)
        last = next(r for r in owner.rounds(run.id) if r.manifest_sha256)
        seen.saw(owner.manifest(last.id).model_dump_json())
        wait(lambda: "round.published" in ledger(owner))
        # The receiver knows nothing of it: signed, sent, refused, and written down as such.
        wait(lambda: any(each.status == 404 for each in owner.deliveries(hook)))
    return seen


def tell(seen: Witness, owner: Client, provider: Provider):
    """A webhook whose secret is rotated, so that two sign."""
    url = f"{provider.issuer}/nobody"
    first = owner.create_webhook(WebhookCreate(url=url, events=["client.registered"]))
    second = owner.rotate_webhook_secret(first.webhook.id)
    seen.secrets |= {each.secret.removeprefix("whsec_") for each in (first, second)}
    owner.test_webhook(first.webhook.id)
    return first.webhook.id


def people(seen: Witness, owner: Client, provider: Provider) -> None:
    """A member whose token is good, and tokens that are not."""
    owner.add_member(MemberCreate(subject="sato", role="viewer"))
    good, late = provider.token(), provider.token(exp=int(time.time()) - 600)
    forged = f"{good.rpartition('.')[0]}.{'A' * 342}"
    seen.secrets |= {good, late, *(part for token in (good, late) for part in token.split(".")[1:])}
    with httpx.Client(base_url=seen.url, trust_env=False) as http:
        asked = http.get("/v1/runs", headers={"Authorization": f"Bearer {good}"})
    assert asked.status_code == 200, asked.text
    for token in (late, forged):
        seen.ask("GET", "/v1/runs", token)


def campaign(owner: Client):
    space = make_space()
    model = owner.create_model(ModelCreate(name="secrets", space=space.to_json()))
    weights = wire.encode_version(space.digest, np.full(space.dim, 0.5, np.float32))
    upload = owner.send_weights(model.id, weights)
    wait(lambda: owner.upload(upload.id).state == "accepted")
    wanted = RunCreate(
        name="secrets", model_id=model.id, settings=RunSettings.model_validate(SETTINGS)
    )
    return space, owner.start_run(owner.create_run(wanted).id)


def take_part(seen: Witness, token: str, name: str, space, *, seed: int) -> None:
    with seen.client(None) as nobody:
        registered = nobody.register(Registration(token=token, name=name))
    with seen.client(registered.key) as client:
        found = client.check_in().assignment
        assert found is not None
        seen.saw(client.download(found.base.id).url)
        data = train(json.loads(found.model_dump_json()), space, seed=seed).data
        ticket = client.reserve_update(found.id, announce(data))
        seen.saw(ticket.url or "")
        client.put_file(ticket, data)
        client.complete(ticket.id)


def provoke(seen: Witness, key: str, tokens: list[str]) -> None:
    """Send secrets where they do not belong; the answers must not repeat them."""
    seen.ask("GET", "/v1/runs", key + "x")
    seen.ask("GET", "/v1/runs", tokens[2])
    seen.ask("POST", "/v1/clients", None, json={"token": tokens[0], "name": "again"})
    seen.ask("POST", "/v1/clients", None, json={"token": tokens[2], "name": "no name"})
    seen.ask("GET", "/metrics", key)
    seen.ask("GET", "/v1/nothing", "the token of the monitoring")


def ledger(owner: Client) -> str:
    return "".join(entry.model_dump_json() for entry in owner.ledger_entries())


def wait(done) -> None:
    for _ in range(1200):
        if done():
            return
        bell.wait(0.1)
    pytest.fail("nothing happened for two minutes")


@pytest.fixture(scope="module")
def secrets(stack, witness) -> set[str]:
    names = ("S3_SECRET_KEY", "KEY_PEPPER", "LEDGER_KEY")
    own = {stack.environment()[name] for name in names} | {"the token of the monitoring"}
    assert len(witness.secrets) > 10
    return own | witness.secrets


def holds(text: str, secrets: set[str]) -> list[str]:
    """How the secrets begin that are in a text, as they are or as hexadecimal digits."""
    return [s[:12] for s in secrets if s in text or s.encode().hex() in text]


def test_logs_hold_no_secret_and_had_none_to_cut_out(stack, secrets):
    for name in PRODUCT:
        text = (stack.root / "logs" / f"{name}.log").read_text()
        assert not holds(text, secrets), name
        assert logs.REMOVED not in text, name
    servers = Path(os.environ["FEDSELECT_TEST_STACK"]) / "logs"
    for log in servers.iterdir():
        assert not holds(log.read_text(errors="replace"), secrets), log.name


def test_log_lines_are_json_with_ids(stack, witness):
    lines = {name: documents(stack.root / "logs" / f"{name}.log") for name in PRODUCT[:2]}
    uploads = [
        line
        for line in lines["coordinator"]
        if line.get("route") == "/v1/uploads/{upload_id}/complete" and "client" in line
    ]
    assert len(uploads) == 2
    # What a client's call made due carries the call's id, through the real message.
    for call in uploads:
        work = [line for line in lines["worker"] if line.get("request") == call["request"]]
        assert any("job verify" in line["message"] for line in work)
        assert {line.get("client") for line in work} == {call["client"]}
        assert all("job" in line and "project" in line for line in work)
    assert any({"run", "round", "job"} <= set(line) for line in lines["worker"])


def documents(log: Path) -> list[dict]:
    """The JSON lines of a log; the few plain ones announce that a process is ready."""
    found = [line for line in log.read_text().splitlines() if line.startswith("{")]
    assert found
    return [json.loads(line) for line in found]


def test_the_ledger_holds_no_secret(stack, witness, secrets):
    with Client(witness.url, key=(stack.root / "owner.key").read_text()) as owner:
        text = ledger(owner)
    assert "round.published" in text
    assert not holds(text, secrets)


def test_refusals_repeat_no_secret(witness, secrets):
    assert len(witness.problems) == 8
    for text in witness.problems:
        assert not holds(text, secrets), text


def test_the_database_holds_no_secret(stack, secrets):
    url = stack.environment()["MIGRATION_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        ).fetchall()
        assert len(tables) > 20
        for (table,) in tables:
            query = psycopg.sql.SQL("SELECT t::text FROM {} AS t").format(
                psycopg.sql.Identifier(table)
            )
            for (row,) in connection.execute(query):
                assert not holds(row, secrets), table


def test_a_supervisor_serves_what_its_children_count(stack):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = subprocess.Popen(
        [sys.executable, "-m", "workers.supervise", "schedule"],
        env={**os.environ, **stack.environment(), "METRICS_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait(lambda: 'step="seal"' in scraped(port))
    finally:
        child.terminate()
        child.wait(30)
    assert scraped(port) == ""


def scraped(port: int) -> str:
    try:
        with httpx.Client(trust_env=False) as http:
            return http.get(f"http://127.0.0.1:{port}/metrics").text
    except httpx.TransportError:
        return ""
