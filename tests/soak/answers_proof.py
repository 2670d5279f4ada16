"""Lost answers: a creating call whose answer is dropped after its commit has had one effect."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import numpy as np

from app import keys, tenants
from app.tables import Organisation
from fedselect import Mask, wire
from fedselect.client import Client, announce
from fedselect.protocol import ModelCreate, RunCreate

from .faultproxy import HOST, Fault, FaultProxy, Kind
from .fleet import REPORT, encode, flat_space, plain_settings
from .proofs import Figures, Json, Room, proof
from .stack import Stack

SPACE = flat_space(8)
WEIGHTS = wire.encode_version(SPACE.digest, np.zeros(8, dtype=np.float32))
# What callers did, and where it can be seen; the service's own work goes on meanwhile.
TABLES = ["clients", "enrolments", "models", "runs", "projects", "members", "keys", "webhooks"]
TABLES += ["uploads", "evaluations", "idempotent_answers", "cohorts", "ablations", "rollouts"]
EFFECTS = " UNION ALL ".join(f"SELECT '{t}', count(*) FROM {t}" for t in TABLES) + (
    " UNION ALL SELECT 'entries', count(*) FROM ledger_entries"
    " WHERE actor NOT IN ('worker', 'scheduler')"
)


@proof(
    promise="a lost answer costs nothing",
    test="every creating call of the interface, again and again: its answer is dropped after the "
    "commit, then it is repeated twice with its Idempotency-Key",
    target="1,000 calls over all of them: 1 effect, same answer",
    quick={"turns": 2, "least": 36},
    full={"turns": 56, "least": 1000},
    minutes=(2, 20),
)
def lost_answers(room: Room, *, turns: int, least: int) -> Figures:
    settings = {"oidc_issuer": "https://issuer.invalid", "webhook_private": "true"}
    with Stack(room.folder / "stack", **settings) as stack:
        port = int(stack.url.rpartition(":")[2])
        with FaultProxy(port, lambda _: Fault(Kind.DROP_RESPONSE)) as proxy:
            trial = Trial(stack, proxy.port)
            with httpx.Client(timeout=20) as trial.http:
                for turn in range(turns):
                    _turn(trial, turn)
                document = trial.ask("GET", "/openapi.json")
        missed = sorted(creating(document) - set(trial.calls))
    total = trial.calls.total()
    text = (
        f"{total:,} answers of {len(trial.calls)} operations dropped: "
        f"{len(trial.wrong)} with another effect or answer"
    )
    if missed:
        text += f"; not tried: {', '.join(missed)}"
    numbers = {"calls": dict(trial.calls), "wrong": trial.wrong[:20], "missed": missed}
    return Figures(total >= least and not trial.wrong and not missed, text, numbers)


def creating(document: Json) -> set[str]:
    """The operations that take an Idempotency-Key."""
    return {
        operation["operationId"]
        for item in document["paths"].values()
        for operation in item.values()
        if any(p["name"] == "Idempotency-Key" for p in operation.get("parameters", []))
    }


@dataclass
class Trial:
    """Makes calls whose first answers are lost, and compares."""

    stack: Stack
    port: int
    http: httpx.Client = field(init=False)
    calls: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def create(self, operation: str, path: str, key: str | None, body: Any = None) -> Json:
        """The answer to a call that was made three times, and first heard at the second."""
        headers = {"Idempotency-Key": uuid4().hex, "Connection": "close"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        before = self._effects()
        try:
            self.http.post(f"http://{HOST}:{self.port}{path}", json=body, headers=headers)
        except httpx.TransportError:
            pass
        else:
            raise AssertionError("the answer was to be dropped")
        once = self._effects()
        url = f"{self.stack.url}{path}"
        second, third = (self.http.post(url, json=body, headers=headers) for _ in range(2))
        self.calls[operation] += 1
        if before == once:
            self.wrong.append(f"{operation}: no effect before the answer was lost")
        if once != self._effects():
            self.wrong.append(f"{operation}: {once} became {self._effects()}")
        if second.status_code != 201 or second.content != third.content:
            self.wrong.append(f"{operation}: {second.status_code} {second.text[:200]}")
        return dict(second.json())

    def ask(self, method: str, path: str, key: str | None = None, body: Any = None) -> Json:
        """The answer to a call that nothing happens to."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        answer = self.http.request(method, f"{self.stack.url}{path}", json=body, headers=headers)
        answer.raise_for_status()
        return dict(answer.json())

    def _effects(self) -> dict[str, int]:
        return dict(self.stack.rows(EFFECTS))


def _turn(trial: Trial, turn: int) -> None:
    """Every creating operation once, in a project of its own."""
    create, stack = trial.create, trial.stack
    _, key = stack.project(f"answers-{turn}")
    ward = {"name": f"ward-{turn}"}
    create("createProject", "/v1/projects", _organisation_key(stack), ward)
    create("addMember", "/v1/members", key, {"subject": f"person-{turn}", "role": "viewer"})
    issued = create("createKey", "/v1/keys", key, {"role": "viewer"})
    create("rotateKey", f"/v1/keys/{issued['info']['id']}/rotate", key, {})
    viewer = trial.ask("POST", "/v1/keys", key, {"role": "viewer"})
    create("rotateOwnKey", "/v1/me/key", viewer["key"], {})
    hook = {"url": "http://127.0.0.1:9/", "events": ["round.failed"]}
    webhook = create("createWebhook", "/v1/webhooks", key, hook)["webhook"]["id"]
    create("rotateWebhookSecret", f"/v1/webhooks/{webhook}/secret", key)
    with stack.client(key) as owner:
        _round(trial, owner, key, turn)


def _organisation_key(stack: Stack) -> str:
    with stack.core.db.transaction("soak", "soak") as tx:
        own = tenants.ensure_project(tx, organisation="soak", project="answers").organisation_id
        place = tx.session.get_one(Organisation, own)
        return keys.first(tx, stack.core.settings.pepper, place, role="owner").key


def _round(trial: Trial, owner: Client, key: str, turn: int) -> None:
    """A model, a client and a run of one round with this client alone."""
    create = trial.create
    wanted = ModelCreate(name=f"model-{turn}", space=SPACE.to_json()).model_dump(mode="json")
    model = create("registerModel", "/v1/models", key, wanted)["id"]
    announced = announce(WEIGHTS).model_dump(mode="json", exclude_defaults=True)
    ticket = create("reserveWeights", f"/v1/models/{model}/uploads", key, announced)
    _put(ticket, WEIGHTS)
    owner.complete(ticket["id"])
    _until(lambda: owner.upload(ticket["id"]).state == "accepted")
    token = create("createEnrolments", "/v1/enrolments", key, {"count": 1})["tokens"][0]
    joined = create("registerClient", "/v1/clients", None, {"token": token, "name": f"site-{turn}"})
    settings = plain_settings(1, 1)
    run = RunCreate(name=f"run-{turn}", model_id=model, settings=settings).model_dump(mode="json")
    run_id = create("createRun", "/v1/runs", key, run)["id"]
    create("createCohort", "/v1/cohorts", key, {"name": "all", "rule": {"percent": 100}})
    owner.start_run(run_id)
    with trial.stack.client(joined["key"]) as site:
        work = next(_offered(site))
        data = encode(work, np.ones(8, dtype=np.float32), Mask.empty(8))
        announced = announce(data).model_dump(mode="json", exclude_defaults=True)
        path = f"/v1/assignments/{work.id}/uploads"
        ticket = create("reserveUpload", path, joined["key"], announced)
        _put(ticket, data)
        site.complete(ticket["id"])
        work = next(_offered(site, "evaluate"))
        path = f"/v1/assignments/{work.id}/evaluations"
        create("reportEvaluation", path, joined["key"], REPORT.model_dump(mode="json"))
        _until(lambda: owner.run(run_id).state == "finished")
        versions = [str(version.id) for version in owner.versions(run_id)]
        create("askAblations", f"/v1/versions/{versions[-1]}/ablations", key, {})
        work = next(_offered(site, "ablate"))
        none = {"whole": None, "tensors": []}
        create("reportAblation", f"/v1/assignments/{work.id}/ablation", joined["key"], none)
    _roll_out(trial, owner, key, model, versions)


def _roll_out(trial: Trial, owner: Client, key: str, model: str, versions: list[str]) -> None:
    """Begin to bring the last version to two clients, one of which stays on the first."""
    (token,) = owner.create_enrolments(1).tokens
    trial.ask("POST", "/v1/clients", None, {"token": token, "name": "second"})
    stable = {"version_id": versions[0], "reason": "what they have"}
    trial.ask("PUT", f"/v1/models/{model}/channels/stable", key, stable)
    wanted = {"name": "may", "model_id": model, "version_id": versions[-1], "minimum": 1}
    trial.create("startRollout", "/v1/rollouts", key, wanted)


def _put(ticket: Json, data: bytes) -> None:
    answer = httpx.put(ticket["url"], content=data, headers=ticket["headers"])
    assert answer.status_code == 200, answer.text


def _offered(site: Client, kind: str = "train") -> Iterator[Any]:
    """The client's next assignment of this kind."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        work = site.check_in(kinds=["train", "evaluate", "ablate"]).assignment
        if work is not None and work.kind == kind:
            yield work
        time.sleep(0.05)
    raise TimeoutError(f"there is no {kind} assignment")


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.05)
