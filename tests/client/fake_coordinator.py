"""The other side, in memory: a coordinator and its object store behind ``httpx.MockTransport``.

It plays one client's runs with real files and real decoding. Ids and keys are derived, not drawn,
so that two lives of the same run can be compared byte by byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx
import numpy as np
from pydantic import BaseModel

from fedselect import checkindocs, evaluations, explaindocs, protocol, uploads, wire
from fedselect.deltafiles import step
from fedselect.deltas import DeltaEncoding
from fedselect.lifecycle import AssignmentState, RoundState, RunState
from fedselect.masks import Mask
from fedselect.personal import Participation, PersonalState, Score
from fedselect.policies import RoundPolicy, RunSettings, Wire
from fedselect.space import FloatVector, Kind, ParameterSpace, Role

from .fake_ledger import Ledger

SERVER, STORE = "https://coordinator.test", "https://store.test"
TOKEN = "fse_token"
KEY = "fsk_secret-of-ward-7"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPACE = ParameterSpace.of(
    [
        ("body.weight", (3, 4), Kind.WEIGHT, Role.SELECTABLE),
        ("body.bias", (3,), Kind.BIAS, Role.SHARED),
        ("norm.running_mean", (2,), Kind.BUFFER, Role.PERSONAL),
    ]
)
A, R = AssignmentState, RoundState
ARM = 1000  # more versions than any arm has
OPEN = {A.ASSIGNED, A.RESERVED}


def known_id(text: str) -> UUID:
    return uuid5(NAMESPACE_URL, text)


class TinyLearner:
    """Numpy "training" that depends on all it should depend on; remembers how often it ran."""

    def __init__(self, space: ParameterSpace = SPACE) -> None:
        self.space = space
        self.trained = 0
        self.fault: Callable[[], None] = lambda: None

    def participate(
        self, state: PersonalState | None, base: FloatVector, *, settings: RunSettings, seed: int
    ) -> Participation:
        self.trained += 1
        self.fault()
        state = state or PersonalState.start(base, settings.policy.first_mask(self.space))
        noise = np.random.default_rng(seed).normal(0, 0.1, self.space.dim)
        theta = (0.9 * state.merge(base) + noise).astype(np.float32)
        grown = state.mask.to_bool().copy()
        grown[state.participations] = True
        following = PersonalState(
            participations=state.participations + 1,
            theta=theta,
            reference=theta,
            merge_mask=state.mask,
            mask=Mask.from_bool(grown),
            buffers={"batches": np.array([state.participations + 1])},
        )
        return Participation(theta, state.mask, 11, following)

    def evaluate(
        self, state: PersonalState, base: FloatVector, *, settings: RunSettings, origin: FloatVector
    ) -> dict[str, Score]:
        self.fault()
        vectors = {"local_only": origin, "global": base, "pre": state.merge(base)}
        vectors["post"] = state.theta
        return self.scores(vectors.items(), own="post", settings=settings)

    def scores(
        self, models: Iterable[tuple[str, FloatVector]], *, own: str, settings: RunSettings
    ) -> dict[str, Score]:
        return {n: Score(7, 10, float(np.abs(v).sum())) for n, v in models}


@dataclass
class Row:
    """An assignment."""

    id: UUID
    kind: str
    base: int
    round: int | None = None
    attempt: int = 1
    state: AssignmentState = A.ASSIGNED
    round_state: RoundState | None = None
    reason: str | None = None
    object: str = ""


@dataclass
class Coordinator:
    """``fates`` says what becomes of (round, attempt); everything else is published.

    Fates: abandon, cancel (an accepted update's round), fail (and be published after all, by a
    retry), reject, late, expire.
    """

    rounds: int = 2
    fates: dict[tuple[int, int], str] = field(default_factory=dict)
    seen: list[httpx.Request] = field(default_factory=list)
    clients: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    pieces: dict[str, dict[int, bytes]] = field(default_factory=dict)  # parts by object and number
    signed: dict[str, uploads.UploadReserve] = field(default_factory=dict)
    answers: dict[str, tuple[bytes, int, bytes]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    sent: dict[UUID, set[str]] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)
    mask: tuple[int, Mask] | None = None
    evaluation: evaluations.EvaluationReport | None = None
    ablation: explaindocs.AblationReport | None = None
    ablating: int | None = None  # the version that an ablation is asked of, once the run has ended
    kinds: list[str] = field(default_factory=list)  # of the last check-in
    run_state: RunState = RunState.RUNNING
    at_once: int = 64
    space_digest: str = SPACE.digest
    ledger: Ledger = field(default_factory=Ledger)
    delta: DeltaEncoding | None = None  # of updates, and of what versions add to each other
    channel: Callable[[int], int | None] = lambda published: None  # what it points at
    pins: Callable[[int], list[int]] = lambda published: []  # what it may point at one day
    compared: int | None = None  # the version that the evaluation is compared with
    steps: list[bytes] = field(default_factory=list)  # the file that leads from n to n + 1
    arm: int = 0  # another arm has other ids, versions and objects
    reach: float = 1.0  # of the first weights

    def __post_init__(self) -> None:
        start = np.linspace(-self.reach, self.reach, SPACE.dim).astype(np.float32)
        self._add_version(start)
        self.settings = RunSettings(
            rounds=max(self.rounds, 3),
            round=RoundPolicy(goal=2, retry_after=4),
            wire=Wire(encoding=self.delta or "f32"),
        )

    # --- HTTP ----------------------------------------------------------------------------------

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if request.url.host == "store.test":
            return self._store(request)
        words = request.url.path.strip("/").split("/")[1:]
        if words != ["clients"] and request.headers.get("authorization") != f"Bearer {KEY}":
            return problem(401, "key_unknown")
        if words[0] == "ledger":
            return self.ledger.answer(words[1:], request.url.params)
        return self._route(request, words)

    def _route(self, request: httpx.Request, words: list[str]) -> httpx.Response:
        match request.method, words:
            case "POST", ["clients"]:
                return self._once(request, self._register)
            case "POST", ["check-ins"]:
                return self._check_in(checkindocs.CheckIn.model_validate_json(request.content))
            case "GET", ["versions", version, "download"]:
                return self._download(int(UUID(version)) - ARM * self.arm)
            case "POST", ["assignments", row, "uploads"]:
                return self._once(request, lambda r: self._reserve(self._row(row), r))
            case "POST", ["uploads", row, "parts"]:
                return self._parts(self._row(row))
            case "POST", ["uploads", row, "complete"]:
                return self._complete(self._row(row))
            case "POST", ["assignments", row, "evaluations"]:
                return self._once(request, lambda r: self._evaluate(self._row(row), r))
            case "POST", ["assignments", row, "ablation"]:
                return self._once(request, lambda r: self._ablated(self._row(row), r))
            case "POST", ["assignments", row, "decline"]:
                return self._decline(self._row(row), json.loads(request.content)["reason"])
        return problem(404, "route_unknown")

    def _once(
        self, request: httpx.Request, work: Callable[[httpx.Request], httpx.Response]
    ) -> httpx.Response:
        key = request.headers["idempotency-key"]
        if key not in self.answers:
            response = work(request)
            if response.is_success:
                self.answers[key] = (request.content, response.status_code, response.content)
            return response
        body, status, content = self.answers[key]
        if body != request.content:
            return problem(422, "idempotency_key_reused")
        return httpx.Response(status, content=content)

    def _store(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.strip("/")
        if "authorization" in request.headers or request.url.params["signature"] != "s+g=":
            return refusal("SignatureDoesNotMatch")
        if request.method == "GET" and name not in self.objects:
            return httpx.Response(404, text="<Error><Code>NoSuchKey</Code></Error>")
        if request.method == "GET":
            return httpx.Response(200, content=self.objects[name])
        announced, body = self.signed[name], request.content
        number = int(request.url.params.get("part", 0))
        pinned = announced.parts[number - 1] if number else announced.md5
        found = hashlib.md5(body).hexdigest()
        if pinned != found or request.headers["content-md5"] != base64_of(pinned):
            return refusal("BadDigest")
        if number:
            self.pieces[name][number] = body
        else:
            self.objects[name] = body
        return httpx.Response(200)

    # --- the agent's calls ---------------------------------------------------------------------

    def _register(self, request: httpx.Request) -> httpx.Response:
        body = protocol.Registration.model_validate_json(request.content)
        if body.token != TOKEN or self.clients:
            return problem(401, "enrolment_used")
        self.clients[body.name] = KEY
        info = protocol.ClientInfo(
            id=known_id(body.name), name=body.name, state="active", tags=[], created_at=NOW
        )
        return answer(201, protocol.Registered(client=info, key=KEY, ledger_key=self.ledger.key))

    def _check_in(self, body: checkindocs.CheckIn) -> httpx.Response:
        self._progress()
        self.kinds = body.kinds or []
        row = next((r for r in self.rows if r.id == body.pending), None)
        if body.pending and row is None:
            return problem(404, "not_found")
        waits = row is not None and row.state in {A.UPLOADED, A.ACCEPTED}
        waits = waits and row.round_state in {R.AGGREGATING, R.FAILED}
        work = None if waits else self._work()
        pending = row and checkindocs.Outcome(
            assignment_id=row.id, state=row.state, round_state=row.round_state, reason=row.reason
        )
        return answer(
            200,
            checkindocs.CheckInAnswer(
                assignment=work and self._document(work, body.versions),
                pending=pending,
                retry_after_min=2,
                retry_after_max=6,
                checkpoint=self.ledger.head(2 * len(self.published) + 1),
                run_state=self.run_state,
                serving=self._serving(self.channel(len(self.published))),
                pinned=[
                    checkindocs.Pinned(arm_id=self._known("arm"), number=number)
                    for number in self.pins(len(self.published))
                ],
            ),
        )

    def _serving(self, number: int | None) -> checkindocs.Serving | None:
        """A version of a channel."""
        if number is None:
            return None
        return checkindocs.Serving(
            channel="stable",
            arm_id=self._known("arm"),
            version=self._info(number),
            space_digest=SPACE.digest,
            settings=self.settings.model_dump(mode="json"),
        )

    def _download(self, number: int) -> httpx.Response:
        data = self.files[number]
        self.objects[self._object(f"version/{number}")] = data
        return answer(200, self._signed(self._object(f"version/{number}"), data))

    def _signed(self, name: str, data: bytes) -> protocol.Download:
        url = f"{STORE}/{name}?signature={quote('s+g=')}"
        digest = wire.file_digest(data)
        return protocol.Download(url=url, sha256=digest, size=len(data), expires_at=NOW)

    def _reserve(self, row: Row, request: httpx.Request) -> httpx.Response:
        body = uploads.UploadReserve.model_validate_json(request.content)
        if self._fate(row) == "expire":
            row.state, row.round_state = A.EXPIRED, R.ABANDONED
        if row.state not in OPEN:
            return problem(409, f"assignment_{row.state.value}")
        if not (body.parts and self.signed.get(row.object) == body):  # else it goes on
            row.object = self._object(f"staging/{len(self.signed)}")
        row.state, self.signed[row.object] = A.RESERVED, body
        self.sent.setdefault(row.id, set()).add(body.sha256)
        headers = {"Content-Length": str(body.size), "Content-MD5": base64_of(body.md5)}
        url = None if body.parts else f"{STORE}/{row.object}?signature={quote('s+g=')}"
        ticket = uploads.UploadTicket(id=row.id, url=url, headers=headers, expires_at=NOW)
        return answer(201, ticket)

    def _parts(self, row: Row) -> httpx.Response:
        announced = self.signed[row.object]
        there = self.pieces.setdefault(row.object, {})
        sizes, found = protocol.part_sizes(announced.size), []
        for number, md5 in enumerate(announced.parts, start=1):
            if number in there:
                continue
            size = sizes[number - 1]
            address = uploads.PartAddress(
                number=number,
                start=sum(sizes[: number - 1]),
                size=size,
                url=f"{STORE}/{row.object}?part={number}&signature={quote('s+g=')}",
                headers={"Content-Length": str(size), "Content-MD5": base64_of(md5)},
            )
            found.append(address)
        document = uploads.MissingParts(
            id=row.id, missing=len(found), parts=found[: self.at_once], expires_at=NOW
        )
        return answer(200, document)

    def _complete(self, row: Row) -> httpx.Response:
        if row.state is A.RESERVED:
            if row.object in self.pieces:
                there = self.pieces[row.object]
                self.objects[row.object] = b"".join(there[n] for n in sorted(there))
            late = self._fate(row) == "late"
            row.state = A.LATE if late else A.UPLOADED
            row.round_state = R.ABANDONED if late else row.round_state
        return answer(202, uploads.UploadStatus(id=row.id, state="uploaded"))

    def _evaluate(self, row: Row, request: httpx.Request) -> httpx.Response:
        if row.state is not A.ASSIGNED:
            return problem(409, f"assignment_{row.state.value}")
        report = evaluations.EvaluationReport.model_validate_json(request.content)
        self.evaluation, row.state, self.run_state = report, A.ACCEPTED, RunState.FINISHED
        document = evaluations.Evaluation(
            client_id=known_id("ward-7"),
            client_name="ward-7",
            version_id=UUID(int=row.base),
            version_number=row.base,
            created_at=NOW,
            **report.model_dump(),
        )
        return answer(201, document)

    def _ablated(self, row: Row, request: httpx.Request) -> httpx.Response:
        if row.state is not A.ASSIGNED:
            return problem(409, f"assignment_{row.state.value}")
        self.ablation = explaindocs.AblationReport.model_validate_json(request.content)
        row.state = A.ACCEPTED
        document = explaindocs.AblationInfo(
            id=row.id,
            client_id=known_id("ward-7"),
            client_name="ward-7",
            version_id=UUID(int=row.base),
            version_number=row.base,
            attempt=1,
            state=row.state,
            reason=None,
            deadline=NOW,
            created_at=NOW,
        )
        return answer(201, document)

    def _decline(self, row: Row, reason: str) -> httpx.Response:
        if row.state not in OPEN:
            return problem(409, f"assignment_{row.state.value}")
        row.state, row.reason = A.DECLINED, reason
        row.round_state = row.round_state and R.ABANDONED
        if row.kind == "evaluate":
            self.run_state = RunState.FINISHED
        outcome = checkindocs.Outcome(assignment_id=row.id, state=row.state, round_state=None)
        return answer(200, outcome)

    # --- rounds --------------------------------------------------------------------------------

    def _progress(self) -> None:
        """One move per check-in: verify an update, or end a round."""
        row = self.rows[-1] if self.rows else None
        if row is None or row.kind != "train":
            return
        fate = self._fate(row)
        if row.state is A.UPLOADED:
            self._verify(row, rejected=fate == "reject")
        elif row.state is A.ACCEPTED and row.round_state in {R.AGGREGATING, R.FAILED}:
            ends = {"abandon": R.ABANDONED, "cancel": R.CANCELLED}
            if row.round_state is R.AGGREGATING:
                ends["fail"] = R.FAILED
            row.round_state = ends.get(fate, R.PUBLISHED)
            if row.round_state is R.PUBLISHED:
                self._publish(row)

    def _verify(self, row: Row, *, rejected: bool) -> None:
        update = wire.decode_update(self.objects[row.object], self._plan(row))
        row.state = A.REJECTED if rejected else A.ACCEPTED
        row.round_state = R.ABANDONED if rejected else R.AGGREGATING
        row.reason = "values_not_finite" if rejected else None
        if not rejected:
            self.mask = (update.meta.mask_version, update.mask)

    def _plan(self, row: Row) -> wire.UpdatePlan:
        lower, upper = self.settings.policy.bounds(SPACE)
        version, mask = self.mask or (0, None)
        return wire.UpdatePlan(
            space=SPACE.digest,
            run=str(known_id("run")),
            round=row.round or 0,
            assignment=str(row.id),
            base_version=wire.file_digest(self.files[row.base]),
            lower=lower,
            upper=upper,
            known_mask=mask,
            known_mask_version=version,
            encoding=self.settings.wire.encoding,
        )

    def _publish(self, row: Row) -> None:
        # The mask was noted at acceptance, so the file is read under what was known before it.
        mask = self._plan(row).known_mask or Mask.empty(SPACE.dim)
        values = wire.update_values(self.objects[row.object], mask)
        base = wire.decode_version(
            self.files[row.base], space_digest=SPACE.digest, dim=SPACE.dim
        ).copy()
        shared = ~mask.to_bool()
        mean = np.zeros_like(base)
        mean[shared] = 0.5 * (values if self.delta else values - base[shared])
        if self.delta is None:
            self._add_version(base + mean)
        else:
            made = step(self.files[row.base], mean, space=SPACE.digest, encoding=self.delta)
            self.files.append(made[0])
            self.steps.append(made[1])
        self.published.append(row.round or 0)

    def _add_version(self, values: FloatVector) -> None:
        self.files.append(wire.encode_version(SPACE.digest, values))

    def _work(self) -> Row | None:
        last = self.rows[-1] if self.rows else None
        if last and last.state in OPEN and last.round_state in {None, R.COLLECTING}:
            return last
        done = len(self.published)
        if done == self.rounds:
            asked = self.ablating is not None and "ablate" in self.kinds
            if last and last.kind == "evaluate" and asked:
                self.rows.append(Row(known_id("ablate"), "ablate", self.ablating or 0))
                return self.rows[-1]
            if last and last.kind != "train":
                return None
            self.run_state = RunState.EVALUATING
            self.rows.append(Row(self._known("evaluate"), "evaluate", done))
            return self.rows[-1]
        attempt = sum(r.round == done + 1 for r in self.rows) + 1
        row = Row(self._known(f"{done + 1}.{attempt}"), "train", done, done + 1, attempt)
        row.round_state = R.COLLECTING
        self.rows.append(row)
        return row

    def _document(self, row: Row, held: list[str]) -> checkindocs.Assignment:
        version = self.mask and checkindocs.MaskInfo(
            version=self.mask[0], sha256=self.mask[1].digest
        )
        return checkindocs.Assignment(
            id=row.id,
            kind=row.kind,
            run=checkindocs.RunBrief(id=known_id("run"), name="run", settings=self.settings),
            arm_id=self._known("arm"),
            round=row.round,
            attempt=row.attempt,
            state=row.state,
            space_digest=self.space_digest,
            base=self._info(row.base),
            deltas=self._chain(row.base, held),
            origin=self._info(0),
            mask=version,
            against=self._serving(self.compared) if row.kind == "evaluate" else None,
            deadline=NOW,
        )

    def _chain(self, number: int, held: list[str]) -> list[checkindocs.DeltaDownload] | None:
        """Deltas from the newest version that the agent has; small ones need not pay off here."""
        digests = [wire.file_digest(data) for data in self.files]
        known = [n for n in range(number + 1) if digests[n] in held]
        if not known or (self.delta is None and known[-1] != number):
            return None
        chain = []
        for n in range(known[-1], number):
            self.objects[self._object(f"delta/{n}")] = self.steps[n]
            download = self._signed(self._object(f"delta/{n}"), self.steps[n])
            link = {"base": digests[n], "result": digests[n + 1], "download": download}
            chain.append(checkindocs.DeltaDownload.model_validate(link))
        return chain

    def _info(self, number: int) -> protocol.VersionInfo:
        data = self.files[number]
        return protocol.VersionInfo(
            id=UUID(int=number + ARM * self.arm),
            model_id=known_id("model"),
            arm_id=self._known("arm"),
            number=number,
            sha256=wire.file_digest(data),
            size=len(data),
            parent_id=None,
            manifest_sha256=None,
            code_version="test",
            created_at=NOW,
        )

    def _object(self, name: str) -> str:
        return f"arm-{self.arm}/{name}" if self.arm else name

    def _known(self, text: str) -> UUID:
        return known_id(f"{self.arm}/{text}" if self.arm else text)

    def _row(self, text: str) -> Row:
        return next(r for r in self.rows if str(r.id) == text)

    def _fate(self, row: Row) -> str:
        return self.fates.get((row.round or 0, row.attempt), "publish")


def base64_of(md5: str) -> str:
    return base64.b64encode(bytes.fromhex(md5)).decode()


def answer(status: int, document: BaseModel) -> httpx.Response:
    return httpx.Response(status, json=document.model_dump(mode="json"))


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    document: dict[str, Any] = {"type": f"urn:{code}", "title": code, "status": status}
    document |= {"detail": f"refused: {code}", "code": code, "request_id": "req-1"}
    return httpx.Response(
        status,
        content=json.dumps(document),
        headers={"content-type": "application/problem+json", **headers},
    )


def refusal(code: str) -> httpx.Response:
    return httpx.Response(403, text=f"<Error><Code>{code}</Code><Key>secret</Key></Error>")
