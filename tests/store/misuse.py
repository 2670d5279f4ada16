"""Misuse of upload addresses against the whole service: what clients try, and what comes of it.

The functions take a project on any store, so that the soak suite can call them with larger numbers.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from service.factories import (
    Client,
    Json,
    Model,
    Project,
    Trained,
    announce,
    ask_store,
    complete,
    drain,
    draw_mask,
    due_jobs,
    everything,
    make_clients,
    make_model,
    make_run,
    ok,
    put,
    train,
)

from app.signing import Signer, pinned
from fedselect import Mask, wire
from fedselect.aggregate import Contribution, reference
from workers import running

HOUR = timedelta(hours=1)


@dataclass
class Case:
    """A client with the address of the file that it has announced."""

    project: Project
    client: Client
    made: Trained
    ticket: Json
    evil: bytes  # an update for the same assignment that would be accepted, too, but says more

    @property
    def key(self) -> str:
        return urlsplit(self.ticket["url"]).path.split("/", 2)[2]

    def send(self, *, url: str | None = None, data: bytes | None = None, **headers: str) -> int:
        """PUT with something changed; a header given as "" is left out."""
        changed = {**self.ticket["headers"], **{k.replace("_", "-"): v for k, v in headers.items()}}
        kept = {name: value for name, value in changed.items() if value}
        ticket = {"url": url or self.ticket["url"], "headers": kept}
        return put(ticket, self.made.data if data is None else data).status_code

    def call(self, method: str) -> int:
        answer = ask_store(
            method, self.ticket["url"], headers=self.ticket["headers"], content=self.made.data
        )
        return answer.status_code

    def expired(self) -> int:
        """With the address that the coordinator would have given an hour ago."""
        settings, data = self.project.core.settings, self.made.data
        signer = Signer.of(settings, settings.public_s3_endpoint)
        headers = pinned(len(data), hashlib.md5(data).hexdigest())
        now = datetime.now(UTC)
        until = now - HOUR + timedelta(seconds=settings.url_lifetime)
        return self.send(
            url=signer.sign("PUT", self.key, since=now - HOUR, until=until, headers=headers)
        )


Attack = Callable[[Case], int]


def _elsewhere(key: Callable[[Case], str]) -> Attack:
    return lambda c: c.send(url=c.ticket["url"].replace(c.key, key(c)), data=c.made.data)


def _resized(data: bytes) -> dict[str, str]:
    return {"content_length": str(len(data))}


def _oversize(case: Case) -> int:
    data = case.made.data + bytes(64 * 1024)
    return case.send(data=data, **_resized(data))


def _shorter(case: Case) -> int:
    data = case.made.data[:-1]
    return case.send(data=data, **_resized(data))


def _own_md5(case: Case) -> int:
    md5 = pinned(len(case.evil), hashlib.md5(case.evil).hexdigest())["content-md5"]
    return case.send(data=case.evil, content_md5=md5)


BEFORE: dict[str, Attack] = {  # with an address, before its file has arrived
    "the key of another staged file": _elsewhere(lambda c: f"staging/{'0' * 32}"),
    "a key in accepted": _elsewhere(lambda c: f"accepted/{c.project.id}/{'0' * 64}"),
    "GET": lambda c: c.call("GET"),
    "DELETE": lambda c: c.call("DELETE"),
    "POST": lambda c: c.call("POST"),
    "oversize": _oversize,
    "shorter": _shorter,
    "another body": lambda c: c.send(data=c.evil),
    "another body with its own md5": _own_md5,
    "another body without md5": lambda c: c.send(data=c.evil, content_md5=""),
    "expired": Case.expired,
    "a longer life": lambda c: c.send(
        url=c.ticket["url"].replace("X-Amz-Expires=", "X-Amz-Expires=9")
    ),
    "tampered signature": lambda c: c.send(
        url=c.ticket["url"][:-1] + ("0" if c.ticket["url"][-1] != "0" else "1")
    ),
    "no signature": lambda c: c.send(url=c.ticket["url"].partition("?")[0]),
}
AFTER: dict[str, Attack] = {  # with the address of a file that is accepted
    "replay": Case.send,
    "overwrite": lambda c: c.send(data=c.evil),
    "overwrite with its own md5": _own_md5,
    "delete": lambda c: c.call("DELETE"),
}


@dataclass
class Siege:
    """A run whose clients, all but the last, misuse the addresses that they get."""

    project: Project
    model: Model
    run: Json
    clients: list[Client]
    masks: dict[str, Mask] = field(default_factory=dict)

    @classmethod
    def begin(cls, project: Project, *, clients: int, rounds: int = 1) -> Siege:
        model = make_model(project)
        run = make_run(project, model, goal=clients, rounds=rounds)
        return cls(project, model, run, make_clients(project, clients))

    def case(self, client: Client, *, seed: int = 0) -> Case:
        """A client's place in the present round, and its announced file."""
        assignment = client.assignment()
        space = self.model.space
        mask = self.masks.setdefault(client.id, draw_mask(assignment, space, seed=seed))
        made = train(assignment, space, seed=seed, mask=mask)
        evil = train(assignment, space, seed=seed + 500, mask=mask).data
        assert len(evil) == len(made.data)
        path = f"/v1/assignments/{assignment['id']}/uploads"
        ticket = ok(client.post(path, announce(made.data)), 201)
        return Case(self.project, client, made, ticket, evil)

    def objects(self) -> dict[str, str]:
        """Digests of everything that verification has kept and publishing has written."""
        storage = self.project.core.storage
        arm = self.run["arm_id"]
        own = (f"accepted/{self.project.id}/", f"masks/{self.project.id}/", f"versions/{arm}/")
        keys = [key for prefix in own for key in storage.keys(prefix)]
        return {key: hashlib.sha256(storage.read(key)).hexdigest() for key in keys}

    def newest(self) -> Json:
        owner = self.project.owner
        return dict(everything(owner, f"/v1/runs/{self.run['id']}/versions")[-1])

    def published(self) -> bytes:
        """The newest version's file as clients download it."""
        download = ok(self.project.owner.get(f"/v1/versions/{self.newest()['id']}/download"))
        return ask_store("GET", download["url"]).content

    def expected(self, base: bytes, sent: list[Trained]) -> bytes:
        """What the honest files come to, in the order of their acceptance."""
        space = self.model.space
        parts = [Contribution(m.mask, m.theta[~m.mask.to_bool()], 1) for m in sent]
        start = wire.decode_version(base, space_digest=space.digest, dim=space.dim)
        return wire.encode_version(space.digest, reference(start, parts, 2))


def verify(project: Project) -> None:
    """Do what is due now, and nothing of what becomes due by that."""
    for job in due_jobs(project):
        running.run_job(project.core, job)


def overwrite_trials(project: Project, trials: int) -> int:
    """In every round, overwrite accepted files in staging; count the rounds that publish the same.

    The strongest attacker: one who may write to staging what he likes, whatever the store enforces,
    and who knows an update that would be accepted.
    """
    siege = Siege.begin(project, clients=2, rounds=trials)
    unchanged = 0
    for trial in range(trials):
        base = siege.published()
        sent: list[Trained] = []
        for number, client in enumerate(siege.clients):
            case = siege.case(client, seed=2 * trial + number)
            assert case.send() == 200
            complete(client, case.ticket)
            verify(project)
            project.core.storage.put(case.key, io.BytesIO(case.evil), len(case.evil))
            sent.append(case.made)
        drain(project)
        unchanged += siege.published() == siege.expected(base, sent)
    return unchanged
