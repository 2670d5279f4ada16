"""The agent against an in-memory coordinator: whole runs, refusals, its folder."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import pytest

from fedselect import checkindocs, wire
from fedselect.agent import enrol
from fedselect.agent_state import AgentFolder
from fedselect.agentdocs import ArmRecord
from fedselect.errors import FedSelectError, ServiceError, TrainingError
from fedselect.lifecycle import AssignmentState
from fedselect.masks import Mask
from fedselect.personal import PersonalState, derive_seed
from fedselect.policies import RunSettings
from fedselect.serving import load_kept
from fedselect.space import Kind, ParameterSpace, Role

from .fake_coordinator import KEY, SERVER, SPACE, TOKEN, Coordinator, TinyLearner, known_id, problem
from .fake_site import NAME, NO_CONTROL, Life, Live, O, sites


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with sites(monkeypatch) as make:
        yield make


# --- whole runs --------------------------------------------------------------------------------


def test_what_leaves_a_site_is_rounded_as_the_run_says(live: Live) -> None:
    """Seven of ten held-out examples, and the number of training examples in each update."""
    life = live(rounds=3)
    rule = {"round_scores": 0.25, "round_counts": 5}
    settings = life.other.settings.model_dump() | {"disclosure": rule}
    life.other.settings = RunSettings.model_validate(settings)
    life.run()
    report = life.other.evaluation
    assert report is not None
    assert {(s.correct, s.total) for s in report.scores.values()} == {(8, 10)}
    assert {s.loss % 0.25 for s in report.scores.values()} == {0}
    assert report.personal_share % 0.25 == 0
    files = [life.other.objects[key] for key in life.other.signed]
    told = {int(wire.read_update_layout(file).metadata["examples"]) for file in files}
    assert told
    assert {number % 5 for number in told} == {0}


def test_a_run_from_enrolment_to_evaluation(live: Live) -> None:
    life = live(rounds=3)
    life.run()
    assert life.outcomes() == [O.TRAINED, O.COMMITTED] * 3 + [O.EVALUATED, O.FINISHED]
    assert life.other.published == [1, 2, 3]
    record, state = life.record(), life.state()
    assert record.tentative is None
    assert record.participations == state.participations == 3
    sizes = {UUID(int=n): len(data) for n, data in enumerate(life.other.files)}
    assert record.bytes_received == sum(sizes.values())
    assert record.bytes_sent == sum(s.size for s in life.other.signed.values())
    report = life.other.evaluation
    assert report is not None
    assert (report.bytes_sent, report.bytes_received) == (record.bytes_sent, record.bytes_received)
    assert report.participations == 3
    assert (report.control_sent, report.control_received) == _control(life)
    assert report.personal_share == state.merge_mask.share(SPACE)
    assert report.scores["post"].loss == pytest.approx(float(np.abs(state.theta).sum()))
    assert all(2 <= s.wait <= 6 for s in life.steps if s.outcome is O.WAITING)


def _control(life: Life) -> tuple[int, int]:
    """Of all calls between enrolment and the report: heads, and bodies that are no files."""
    end = next(n for n, r in enumerate(life.other.seen) if r.url.path.endswith("evaluations"))
    sent = received = 0
    for request, response in zip(life.other.seen[1:end], life.answers[1:end], strict=True):
        head = f"{request.method} {request.url.raw_path.decode()} HTTP/1.1\r\n"
        sent += len(head) + _fields(request.headers)
        head = f"HTTP/1.1 {response.status_code} {response.reason_phrase}\r\n"
        received += len(head) + _fields(response.headers)
        if request.url.host != "store.test":
            sent, received = sent + len(request.content), received + len(response.content)
    return sent, received


def _fields(headers: httpx.Headers) -> int:
    return len("".join(f"{k}: {v}\r\n" for k, v in headers.multi_items())) + 2


def test_only_the_files_in_use_stay_and_only_their_owner_reads_them(
    live: Live,
) -> None:
    life = live(rounds=3)
    life.run()
    arm = f"arms/{known_id('arm')}"
    digests = {f"versions/{wire.file_digest(life.other.files[n])}" for n in (0, 2, 3)}
    assert set(life.files()) == digests | {
        "lock",
        "credentials.json",
        "checkpoint.txt",
        "ledger-key.txt",
        "space.json",
        f"{arm}/arm.json",
        f"{arm}/run.json",
        *(f"{arm}/{known_id(row)}.safetensors" for row in ("1.1", "2.1", "3.1")),
    }
    modes = {stat.S_IMODE(p.stat().st_mode) for p in life.path.rglob("*")}
    assert stat.S_IMODE(life.path.stat().st_mode) == 0o700
    assert modes == {0o600, 0o700}
    assert life.files()["checkpoint.txt"].decode() == life.other.ledger.head(7)


def test_the_mask_travels_only_when_it_changed(live: Live) -> None:
    life = live(rounds=3)
    masks = []
    grow = life.learner.participate

    def rarely(state: PersonalState | None, *args: Any, **kwargs: Any) -> Any:
        done = grow(state, *args, **kwargs)
        if done.state.participations == 1:
            return done
        return type(done)(done.theta, done.mask, done.examples, _with_mask(done.state, done.mask))

    life.learner.participate = rarely  # type: ignore[method-assign]
    life.run()
    for row in life.other.rows[:3]:
        layout = wire.read_update_layout(life.other.objects[row.object])
        masks.append(("mask" in layout.sections, layout.metadata["mask_version"]))
    assert masks == [(True, "1"), (True, "2"), (False, "2")]


def _with_mask(state: PersonalState, mask: Mask) -> PersonalState:
    return PersonalState(
        state.participations, state.theta, state.reference, mask, mask, state.buffers
    )


def test_training_gets_the_seed_of_the_protocol(live: Live) -> None:
    life = live(rounds=1)
    life.run()
    settings = life.other.settings
    start = wire.decode_version(life.other.files[0], space_digest=SPACE.digest, dim=SPACE.dim)
    seed = derive_seed(settings, NAME, 1)
    expected = TinyLearner().participate(None, start, settings=settings, seed=seed)
    assert life.state().to_bytes(SPACE) == expected.state.to_bytes(SPACE)


# --- versions by deltas ------------------------------------------------------------------------


def fetched(life: Live) -> list[str]:
    """What was read from the object store, in order."""
    gets = [r for r in life.other.seen if r.method == "GET" and r.url.host == "store.test"]
    return [r.url.path.strip("/") for r in gets]


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_versions_come_as_deltas_to_the_one_before(live: Live, encoding: str) -> None:
    life = live(rounds=3, delta=encoding)
    life.run()
    assert life.outcomes() == [O.TRAINED, O.COMMITTED] * 3 + [O.EVALUATED, O.FINISHED]
    assert fetched(life) == ["version/0", "delta/0", "delta/1", "delta/2"]
    kept = {p.name for p in (life.path / "versions").iterdir()}
    assert kept == {wire.file_digest(life.other.files[n]) for n in (0, 2, 3)}
    record = life.record()
    assert record.delta_bytes_received == sum(map(len, life.other.steps))
    assert record.bytes_received == len(life.other.files[0]) + record.delta_bytes_received


def test_what_is_held_already_is_not_fetched(live: Live) -> None:
    life = live(rounds=1)
    life.run(steps=1)
    life.other.rows.clear()
    life.run()
    assert fetched(life) == ["version/0", "version/1"]


@pytest.mark.parametrize("harm", ["gone", "damaged", "other base", "elsewhere"])
def test_whatever_is_wrong_with_a_delta_the_whole_file_is_right(live: Live, harm: str) -> None:
    life = live(rounds=2, delta="int8")
    chain = life.other._chain

    def harmed(number: int, held: list[str]) -> Any:
        found = chain(number, held)
        if number != 1 or not found:
            return found
        wrong = life.other.steps[0]
        if harm == "gone":
            del life.other.objects["delta/0"]
        elif harm == "damaged":
            life.other.objects["delta/0"] = wrong[:-1] + b"x"
        else:
            old, new = "base", "9" * 64
            if harm == "elsewhere":
                old = "result"
            parts = wrong.partition(f'"{old}":"'.encode())
            wrong = parts[0] + parts[1] + new.encode() + parts[2][64:]
            life.other.objects["delta/0"] = wrong
            download = life.other._signed("delta/0", wrong)
            found[0] = found[0].model_copy(update={"download": download})
        return found

    life.other._chain = harmed  # type: ignore[method-assign]
    life.run()
    assert life.outcomes() == [O.TRAINED, O.COMMITTED] * 2 + [O.EVALUATED, O.FINISHED]
    assert fetched(life) == ["version/0", "delta/0", "version/1", "delta/1"]
    assert life.record().participations == 2


def test_a_client_that_was_away_catches_up_in_one_chain(live: Live) -> None:
    life = live(rounds=3, delta="bf16")
    life.run()
    other = live(rounds=0)
    other.other.__dict__.update(life.other.__dict__, rows=[], seen=[], clients={}, answers={})
    other.other.published = [1, 2, 3]
    first = life.other.files[0]
    (other.path / "versions").mkdir(parents=True)
    (other.path / "versions" / wire.file_digest(first)).write_bytes(first)
    other.run()
    assert other.outcomes() == [O.EVALUATED, O.FINISHED]
    assert fetched(other) == ["delta/0", "delta/1", "delta/2"]


# --- tentative until published -----------------------------------------------------------------


@pytest.mark.parametrize("delta", [None, "bf16", "int8"])
@pytest.mark.parametrize("fate", ["abandon", "cancel", "reject", "late", "expire"])
def test_work_that_does_not_count_is_discarded_and_done_again(
    live: Live, fate: str, delta: str | None
) -> None:
    plain = live(rounds=2, delta=delta)
    plain.run()
    life = live(rounds=2, delta=delta, fates={(2, 1): fate, (2, 2): fate})
    life.run()
    lost = [O.DISCARDED] if fate == "expire" else [O.TRAINED, O.DISCARDED]
    assert life.outcomes() == [
        *[O.TRAINED, O.COMMITTED],
        *lost * 2,
        *[O.TRAINED, O.COMMITTED, O.EVALUATED, O.FINISHED],
    ]
    # The same round repeats the same training from the same committed state.
    assert life.state().to_bytes(SPACE) == plain.state().to_bytes(SPACE)
    assert life.other.files == plain.other.files
    assert life.record().participations == 2
    sent = 0 if fate == "expire" else 2
    assert len(life.other.sent) == 2 + sent
    more = life.record().bytes_sent - plain.record().bytes_sent
    assert (more > 0) == bool(sent)


@pytest.mark.parametrize("delta", ["bf16", "int8"])
def test_what_an_encoding_loses_is_kept_where_the_element_is_still_shared(
    live: Live, delta: str
) -> None:
    life = live(rounds=3, delta=delta)
    life.run()
    state = life.state()
    assert state.residual is not None
    personal = state.merge_mask.to_bool()
    assert not state.residual[personal].any()
    assert state.residual[~personal].any()
    assert PersonalState.from_bytes(state.to_bytes(SPACE), SPACE).residual is not None


def test_a_failed_round_is_not_over(live: Live) -> None:
    """Its jobs may be tried again, and then the work counts after all."""
    plain, life = live(rounds=2), live(rounds=2, fates={(1, 1): "fail"})
    plain.run()
    life.run()
    assert life.outcomes() == plain.outcomes()
    assert [s.detail for s in life.steps].count("the round is not over") == 1 + 2
    assert life.state().to_bytes(SPACE) == plain.state().to_bytes(SPACE)
    assert life.other.files == plain.other.files


def test_a_discarded_step_says_why(live: Live) -> None:
    life = live(rounds=1, fates={(1, 1): "reject"})
    life.run()
    (step,) = [s for s in life.steps if s.outcome is O.DISCARDED]
    assert step.round == 1
    assert step.detail == "the update is rejected, its round abandoned: values_not_finite"


def test_nothing_moves_while_the_outcome_is_open(live: Live) -> None:
    life = live(rounds=1)
    life.other._progress = lambda: None  # type: ignore[method-assign]
    life.run(steps=6)
    assert life.outcomes() == [O.TRAINED]
    assert life.record().committed is None
    assert life.record().tentative is not None
    assert life.learner.trained == 1


def test_work_nobody_knows_of_is_discarded_but_not_for_a_wrong_address(
    live: Live,
) -> None:
    life = live(rounds=1)
    life.run(steps=1)
    reply = problem(404, "route_unknown")
    life.other.__class__ = type("Elsewhere", (Coordinator,), {"__call__": lambda *_: reply})
    life.run(steps=2)
    assert life.record().tentative is not None
    life.other.__class__ = Coordinator
    life.other.rows.clear()
    life.run(steps=1)
    assert life.steps[-1].outcome is O.DISCARDED


# --- what a client cannot do ---------------------------------------------------------------------


def test_another_model_is_declined_with_a_reason(live: Live) -> None:
    life = live(rounds=1, space_digest="f" * 64)
    life.run(steps=3)
    assert life.outcomes() == [O.DECLINED] * 3
    assert life.other.rows[0].state is AssignmentState.DECLINED
    assert "this task's model has parameter space" in (life.other.rows[0].reason or "")
    assert life.learner.trained == 0
    assert not any("staging" in str(r.url) for r in life.other.seen)


def test_failed_training_is_declined_and_costs_nothing(live: Live) -> None:
    life = live(rounds=2)
    life.run(steps=3)
    before = life.record()
    assert before.committed is not None

    def fail() -> None:
        if len(life.other.rows) == 2:
            raise TrainingError("loss is nan in step 3")

    life.learner.fault = fail
    life.run(steps=1)
    assert life.outcomes()[-1] is O.DECLINED
    assert life.other.rows[-1].reason == "loss is nan in step 3"
    assert life.record().committed == before.committed
    life.run()
    assert life.outcomes()[-4:] == [O.TRAINED, O.COMMITTED, O.EVALUATED, O.FINISHED]
    assert life.record().participations == 2


def test_shared_values_that_are_not_finite_never_leave(live: Live) -> None:
    life = live(rounds=1)
    honest = life.learner.participate

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        done = honest(*args, **kwargs)
        done.theta[0] = np.nan
        return done

    life.learner.participate = poisoned  # type: ignore[method-assign]
    life.run(steps=1)
    assert life.outcomes() == [O.DECLINED]
    assert not life.other.signed
    assert life.record(**NO_CONTROL) == ArmRecord(
        bytes_received=len(life.other.files[0]), received=(wire.file_digest(life.other.files[0]),)
    )


def test_an_evaluation_without_numbers_is_declined(live: Live) -> None:
    life = live(rounds=1)
    score = life.learner.evaluate

    def diverged(*args: Any, **kwargs: Any) -> Any:
        scores = score(*args, **kwargs)
        return scores | {"pre": type(scores["pre"])(1, 10, float("nan"))}

    life.learner.evaluate = diverged  # type: ignore[method-assign]
    life.run()
    assert life.outcomes() == [O.TRAINED, O.COMMITTED, O.DECLINED, O.FINISHED]
    assert "scores.pre.loss" in (life.other.rows[-1].reason or "")


@pytest.mark.parametrize(("least", "sent"), [(10, True), (11, False)])
def test_scores_of_few_examples_do_not_leave_the_client(live: Live, least: int, sent: bool) -> None:
    life = live(rounds=0)
    rule = life.other.settings.report.model_copy(update={"min_examples": least})
    life.other.settings = life.other.settings.model_copy(update={"report": rule})
    life.run()
    assert life.other.evaluation is not None
    assert bool(life.other.evaluation.scores) is sent, "the fake's scores are of 10 examples"


def test_a_client_that_never_took_part_evaluates_from_the_start(live: Live) -> None:
    life = live(rounds=0)
    life.run()
    assert life.outcomes() == [O.EVALUATED, O.FINISHED]
    report = life.other.evaluation
    assert report is not None
    assert (report.participations, report.bytes_sent) == (0, 0)
    assert report.personal_share == Mask.initial(SPACE).share(SPACE)


def test_a_refused_announcement_gives_the_assignment_back(live: Live) -> None:
    life = live(rounds=1)
    life.other._reserve = lambda row, request: problem(413, "body_too_large")  # type: ignore[method-assign]
    life.run(steps=2)
    assert life.outcomes() == [O.DECLINED, O.DISCARDED]


def test_work_in_settings_of_a_later_release_is_given_back_with_their_names(live: Live) -> None:
    life = live(rounds=1)
    known = life.other._check_in

    def newer(body: checkindocs.CheckIn) -> httpx.Response:
        document = known(body).json()
        if document["assignment"]:
            policy = document["assignment"]["run"]["settings"]["policy"]
            policy |= {"score": "psychic", "aura": 3}
        return httpx.Response(200, json=document)

    life.other._check_in = newer  # type: ignore[method-assign]
    life.run(steps=1)
    assert life.outcomes() == [O.DECLINED]
    assert "policy.aura, policy.score" in life.steps[0].detail
    assert "install a newer fedselect" in life.steps[0].detail
    assert [row.state for row in life.other.rows] == [AssignmentState.DECLINED]


def test_an_answer_that_is_broken_elsewhere_is_refused_whole(live: Live) -> None:
    life = live(rounds=1)
    known = life.other._check_in

    def broken(body: checkindocs.CheckIn) -> httpx.Response:
        document = known(body).json()
        document["assignment"]["run"]["settings"]["policy"]["aura"] = 3
        document["assignment"]["deadline"] = "soon"
        return httpx.Response(200, json=document)

    life.other._check_in = broken  # type: ignore[method-assign]
    life.run(steps=1)
    assert "answer is not the expected document" in life.steps[0].detail
    assert [row.state for row in life.other.rows] == [AssignmentState.ASSIGNED]


# --- the service refuses, or is away -------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [(401, "key_revoked"), (403, "scope_missing")])
def test_a_key_that_counts_no_more_ends_the_agent(live: Live, status: int, code: str) -> None:
    life = live(rounds=1)
    life.run(steps=1)
    life.other._check_in = lambda body: problem(status, code)  # type: ignore[method-assign]
    with pytest.raises(ServiceError, match=code) as caught:
        life.run()
    assert KEY not in str(caught.value)
    assert life.record().tentative is not None


@pytest.mark.parametrize(
    "reply",
    [
        problem(403, "client_suspended"),
        problem(503, "unavailable"),
        problem(409, "conflict"),
        httpx.Response(403, text="proxy"),
        httpx.Response(502),
    ],
)
def test_anything_else_is_waited_out_with_growing_patience(
    live: Live, reply: httpx.Response
) -> None:
    life = live(rounds=1)
    life.other._check_in = lambda body: httpx.Response(  # type: ignore[method-assign]
        reply.status_code, content=reply.content
    )
    life.run(steps=10)
    assert {s.outcome for s in life.steps} == {O.WAITING}
    waits = [s.wait for s in life.steps]
    assert all(2.5 * 2**n <= waits[n] <= 5 * 2**n for n in range(5))
    assert max(waits) <= 300
    assert all(s.detail for s in life.steps)


def test_patience_is_fresh_after_a_success(live: Live) -> None:
    life = live(rounds=1)
    calls = 0

    def cut(where: str) -> None:
        nonlocal calls
        calls += where == "before POST /v1/check-ins"
        if where == "before POST /v1/check-ins" and calls % 12 < 10:
            raise httpx.ConnectError("away")

    life.cut = cut
    life.run(steps=12)
    away = [s.wait for s in life.steps if "away" in s.detail]
    assert len(away) > 4
    assert max(away) <= 10


def test_a_lying_object_store_is_not_believed(live: Live) -> None:
    life = live(rounds=1)
    info = life.other._info
    life.other._info = lambda n: info(n).model_copy(  # type: ignore[method-assign]
        update={"sha256": "0" * 64}
    )
    life.run(steps=2)
    assert {s.outcome for s in life.steps} == {O.WAITING}
    assert "another file" in life.steps[0].detail
    assert life.record() == ArmRecord()


def test_an_expired_upload_address_is_asked_for_again(live: Live) -> None:
    life = live(rounds=1)
    store = life.other._store
    refused = []

    def expired(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT" and not refused:
            refused.append(request)
            return httpx.Response(403, text="<Code>AccessDenied</Code>")
        return store(request)

    life.other._store = expired  # type: ignore[method-assign]
    life.run()
    assert life.outcomes() == [O.TRAINED, O.COMMITTED, O.EVALUATED, O.FINISHED]
    assert "AccessDenied" in next(s.detail for s in life.steps if s.outcome is O.WAITING)
    assert life.learner.trained == 1
    assert len(life.other.signed) == 2
    assert {len(digests) for digests in life.other.sent.values()} == {1}


def test_an_upload_that_cannot_be_completed_is_sent_again_and_counted_once(
    live: Live,
) -> None:
    life = live(rounds=1)
    complete = life.other._complete
    refused = []

    def lost(row: Any) -> httpx.Response:
        if not refused:
            refused.append(row)
            return problem(404, "not_found")
        return complete(row)

    life.other._complete = lost  # type: ignore[method-assign]
    life.run()
    assert life.outcomes() == [O.TRAINED, O.COMMITTED, O.EVALUATED, O.FINISHED]
    assert len(life.other.signed) == 2
    assert life.record().bytes_sent == next(iter(life.other.signed.values())).size


# --- the folder --------------------------------------------------------------------------------


def test_two_agents_cannot_share_a_folder(tmp_path: Path) -> None:
    first = AgentFolder(tmp_path / "site")
    with pytest.raises(FedSelectError) as caught:
        AgentFolder(tmp_path / "site")
    assert caught.value.code == "state_locked"
    first.close()
    AgentFolder(tmp_path / "site").close()


def test_a_folder_belongs_to_one_client(live: Live) -> None:
    life = live(rounds=1)
    life.run(steps=1)
    folder = AgentFolder(life.path)
    with pytest.raises(FedSelectError, match="belongs to client 'ward-7'"):
        enrol(life.client(), folder, token=TOKEN, name="ward-8")


@pytest.mark.parametrize(("name", "token"), [("ward 7", TOKEN), (NAME, TOKEN * 50)])
def test_an_impossible_registration_is_refused_before_anything_is_written(
    live: Live, name: str, token: str
) -> None:
    life = live()
    with pytest.raises(FedSelectError) as caught:
        enrol(life.client(), AgentFolder(life.path), token=token, name=name)
    assert caught.value.code == "request_invalid"
    assert TOKEN not in str(caught.value)
    assert caught.value.__context__ is None
    assert set(life.files()) == {"lock"}


def test_another_token_is_another_registration(live: Live) -> None:
    folder = AgentFolder(live().path)
    first = folder.registering(SERVER, name=NAME, token="one")
    assert folder.registering(SERVER, name=NAME, token="one") == first
    second = folder.registering(SERVER, name=NAME, token="two")
    assert second.idempotency_key != first.idempotency_key
    assert b"two" not in (folder.path / "registration.json").read_bytes()


@pytest.mark.parametrize("name", ["arm.json", "state"])
def test_damaged_files_stop_the_agent_and_are_not_overwritten(live: Live, name: str) -> None:
    life = live(rounds=2)
    life.run(steps=3)
    record = life.record()
    assert record.committed is not None
    file = record.committed.state.name if name == "state" else name
    path = life.arm / file
    path.write_bytes(path.read_bytes()[:-1])
    before = life.files()
    with pytest.raises(FedSelectError) as caught:
        life.run()
    assert caught.value.code == "state_corrupt"
    after = {n: d for n, d in life.files().items() if file in n}
    assert after == {n: d for n, d in before.items() if file in n}


def test_a_damaged_version_is_fetched_again(live: Live) -> None:
    life = live(rounds=2)
    life.run(steps=1)
    (path,) = (life.path / "versions").iterdir()
    path.write_bytes(b"")
    life.run()
    assert life.outcomes()[-1] is O.FINISHED
    assert life.record().participations == 2


def test_a_changed_model_does_not_take_up_the_old_state(live: Live) -> None:
    life = live(rounds=2)
    life.run(steps=3)
    slots = [(s.name, s.shape, s.kind, s.role) for s in SPACE.slots]
    life.learner.space = ParameterSpace.of([*slots, ("new", (1,), Kind.BIAS, Role.SHARED)])
    before = life.record().committed
    life.run(steps=3)
    assert life.outcomes()[-1] is O.DECLINED
    assert life.record().committed == before


def test_the_credentials_hide_their_key(live: Live) -> None:
    life = live()
    known = enrol(life.client(), AgentFolder(life.path), token=TOKEN, name=NAME)
    assert known.key == KEY
    assert KEY not in repr(known)
    (life.path / "credentials.json").write_text(json.dumps({"key": KEY}))
    with pytest.raises(FedSelectError) as caught:
        AgentFolder(life.path).credentials()
    assert KEY not in str(caught.value)
    assert caught.value.__context__ is None


# --- ablations ---------------------------------------------------------------------------------


def test_an_ablation_is_answered_with_numbers(live: Live) -> None:
    life = live(rounds=2, ablating=2)
    life.run()
    assert life.outcomes()[-3:] == [O.EVALUATED, O.ABLATED, O.FINISHED]
    assert life.other.kinds == ["train", "evaluate", "ablate"]
    found, state = life.other.ablation, life.state()
    base = wire.decode_version(life.other.files[2], space_digest=SPACE.digest, dim=SPACE.dim)
    assert found.whole.loss == pytest.approx(float(np.abs(state.merge(base)).sum()))
    assert (found.without.correct, found.without.total) == (5, 50)
    assert found.tensors[0].name == "body.weight"


def test_an_agent_that_cannot_explain_is_not_asked(live: Live) -> None:
    life = live(rounds=1, ablating=1)
    life.explainer = None
    life.run()
    assert life.other.kinds == ["train", "evaluate"]
    assert life.outcomes()[-2:] == [O.EVALUATED, O.FINISHED]
    assert life.other.ablation is None


def test_scores_of_few_examples_do_not_leave_with_an_ablation(live: Live) -> None:
    life = live(rounds=1, ablating=1)
    life.explainer.total = 9
    life.run()
    found = life.other.ablation
    assert found.whole is found.without is None
    assert [tensor.score for tensor in found.tensors] == [None]
    sent = next(r for r in life.other.seen if r.url.path.endswith("/ablation"))
    assert b'"total"' not in sent.content


def test_an_ablation_that_cannot_be_done_is_declined(live: Live) -> None:
    life = live(rounds=1, ablating=1)

    def fault() -> None:
        raise TrainingError("the ablation cannot be reported: loss")

    life.explainer.fault = fault
    life.run()
    assert life.outcomes()[-2:] == [O.DECLINED, O.FINISHED]
    assert life.other.rows[-1].reason == "the ablation cannot be reported: loss"


def test_a_client_that_never_took_part_has_nothing_to_explain(live: Live) -> None:
    life = live(rounds=0, ablating=0)
    life.run()
    assert life.outcomes() == [O.EVALUATED, O.DECLINED, O.FINISHED]
    assert "nothing of this run's model" in life.other.rows[-1].reason
    assert life.explainer.asked == 0


# --- how different this client is ---------------------------------------------------------------


@pytest.mark.parametrize("delta", [None, "bf16"])
def test_its_last_step_is_compared_with_that_of_all(live: Live, delta: str | None) -> None:
    life = live(rounds=3, delta=delta)
    life.run()
    start, end = (
        wire.decode_version(data, space_digest=SPACE.digest, dim=SPACE.dim)
        for data in life.other.files[2:]
    )
    state = life.state()
    shared = ~state.merge_mask.to_bool()
    own, together = (state.theta - start)[shared], (end - start)[shared]
    cosine = float(own @ together / np.linalg.norm(own) / np.linalg.norm(together))
    assert life.other.evaluation.divergence == pytest.approx(1 - cosine, abs=1e-6)
    assert life.record().committed.base == wire.file_digest(life.other.files[2])


def test_labels_are_told_only_where_the_site_agreed(live: Live) -> None:
    life = live(rounds=1)
    life.run()
    assert life.other.evaluation.labels is None
    agreed = live(rounds=1)
    agreed.explainer.told = {"walk": 40, "fall": 9}
    agreed.run()
    assert agreed.other.evaluation.labels == {"walk": 40}, "few of a label stay where they are"


def test_the_folder_says_what_run_it_is(live: Live) -> None:
    life = live(rounds=1)
    life.run()
    kept = load_kept(life.path)
    assert kept.run.settings == life.other.settings
    assert (kept.run.name, kept.client, kept.round) == ("run", NAME, 1)
    assert kept.base == life.other.files[0]
    assert kept.state.merge_mask == life.state().merge_mask
    (life.arm / "run.json").write_text("{")
    assert load_kept(life.path).run is None
