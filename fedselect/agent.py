"""The agent: one client's side of a run, as a step that can be repeated and resumed.

Owns what to do with each answer of the coordinator. Files are ``agent_state``, training is the
learner, calls are ``client``. Personal state moves on only when the coordinator says that the
update was accepted and its round published. Must not import torch, sleep or read a clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pydantic import ValidationError

from fedselect import __version__, outcomes
from fedselect.agent_state import AgentFolder, Arm
from fedselect.agentdocs import Credentials, Delivery, Tentative
from fedselect.checkindocs import Assignment, CheckInAnswer, Serving
from fedselect.client import Client
from fedselect.deltas import DELTA_ENCODINGS
from fedselect.errors import (
    FedSelectError,
    MaskError,
    ServiceError,
    SpaceError,
    TrainingError,
    WireError,
)
from fedselect.exchange import STORE_REFUSED, TRANSIENT, Retries
from fedselect.feedback import write_update
from fedselect.fetching import Versions
from fedselect.lifecycle import RunState
from fedselect.personal import (
    Explainer,
    Learner,
    Participation,
    PersonalState,
    derive_seed,
)
from fedselect.protocol import Registration
from fedselect.scoring import Scorer
from fedselect.switching import Switch
from fedselect.wire import UpdateMeta
from fedselect.witness import Witness

ENCODINGS = ("f32", *DELTA_ENCODINGS)
KINDS = ("train", "evaluate", "ablate")
# What makes this client unable to do one assignment, and leaves everything else as it was.
_UNABLE = (TrainingError, SpaceError, MaskError, WireError)
_ENDED_RUNS = frozenset({RunState.FINISHED, RunState.STOPPED})
_INVALID = frozenset({400, 413, 422})  # the same request would be refused again


class StepOutcome(StrEnum):
    """What a step did."""

    WAITING = "waiting"  # nothing to do, or the service is out of reach
    TRAINED = "trained"  # an update was delivered; its work is tentative
    COMMITTED = "committed"  # the tentative work counts
    DISCARDED = "discarded"  # the tentative work counts for nothing
    EVALUATED = "evaluated"
    SERVING = "serving"  # another version is served from now on
    ABLATED = "ablated"  # it was said what the personal part is worth
    DECLINED = "declined"  # this client could not do its assignment
    FINISHED = "finished"  # the run has ended and nothing is pending


@dataclass(frozen=True, slots=True)
class Step:
    """What a step did and how many seconds to wait before the next; ``detail`` is for people."""

    outcome: StepOutcome
    wait: float
    round: int | None = None
    detail: str = ""


def enrol(client: Client, folder: AgentFolder, *, token: str, name: str) -> Credentials:
    """Register this folder's client, once: after a crash the same registration is repeated.

    Raises:
        ServiceError: the coordinator refuses, or is out of reach.
        FedSelectError: ``state_mismatch`` if the folder belongs to a client of another name,
            ``request_invalid`` if the name or the token cannot be one.
    """
    known = folder.credentials()
    if known is None:
        registration = _registration(token, name)
        begun = folder.registering(client.server, name=name, token=token)
        made = client.register(registration, idempotency_key=begun.idempotency_key)
        known = Credentials(
            server=client.server, client_id=made.client.id, name=made.client.name, key=made.key
        )
        if made.ledger_key is not None:
            folder.pin(made.ledger_key)
        folder.registered(known)
    if known.name != name:
        raise FedSelectError(
            f"{folder.path} belongs to client {known.name!r}, not {name!r}; use another --state",
            code="state_mismatch",
        )
    return known


def _registration(token: str, name: str) -> Registration:
    try:
        return Registration(token=token, name=name)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        text = f"the client's {fault['loc'][0]} is not valid: {fault['msg']}"
    # Raised out here, so that no exception drags the token along.
    raise FedSelectError(text, code="request_invalid")


class Agent:
    """Does one thing per :meth:`step`; kill it anywhere and make it again from the same folder.

    Without an ``explainer`` it is never asked for an ablation.
    """

    def __init__(
        self,
        client: Client,
        learner: Learner,
        folder: AgentFolder,
        *,
        name: str,
        rng: random.Random,
        explainer: Explainer | None = None,
    ) -> None:
        self._client = client
        self._learner = learner
        self._kinds = KINDS if explainer is not None else KINDS[:-1]
        self._folder = folder
        self._name = name
        self._rng = rng
        self._patience = Retries(rng, first=5.0, longest=300.0)
        self._failures = 0
        self._recent: tuple[str, PersonalState] | None = None  # by the SHA-256 of its file
        self._witness = Witness(client, folder)
        folder.meter = client.control.take
        folder.keep_space(learner.space)
        self._versions = Versions(client, folder, learner.space)
        self._switch = Switch(folder, learner, self._versions, name=name)
        self._scorer = Scorer(client, learner, self._versions, self._switch, explainer)

    def run(
        self,
        sleep: Callable[[float], object],
        *,
        until_finished: bool = False,
        report: Callable[[Step], object] | None = None,
    ) -> None:
        """Step until ``sleep`` (of seconds; ``Event.wait`` fits) returns true or the run has ended.

        ``report`` is told of every step.

        Raises:
            FedSelectError: see :meth:`step`.
        """
        while True:
            step = self.step()
            if report is not None:
                report(step)
            if until_finished and step.outcome is StepOutcome.FINISHED:
                return
            if sleep(step.wait):
                return

    def step(self) -> Step:
        """Check in and do the one thing that is due.

        Raises:
            ServiceError: the key is not valid (any more), or it is not a client's.
            FedSelectError: the folder's files are damaged or belong to another model.
            LedgerError: the coordinator's ledger is not the one that it has shown before.
        """
        try:
            step = self._advance()
        except ServiceError as error:
            if _is_final(error):
                raise
            self._failures += 1
            return Step(
                StepOutcome.WAITING, self._patience.backoff(self._failures), detail=str(error)
            )
        self._failures = 0
        self._witness.wait(step.wait)
        return step

    def _advance(self) -> Step:
        pending = self._folder.pending()
        try:
            answer = self._check_in([tentative for _, tentative in pending])
        except ServiceError as error:
            if error.code != "not_found" or not pending:
                raise
            arm, tentative = pending[0]  # of the others, the answer would just be silent
            arm.discard()  # nobody knows the assignment any more, so it can never be published
            wait = self._patience.backoff(1)
            return Step(StepOutcome.DISCARDED, wait, tentative.round, str(error))
        work, wait = answer.assignment, self._pause(answer)
        if self._switch.pin(answer.pinned):
            pending = self._folder.pending()  # their records have changed
        ended = list(outcomes.ended(pending, answer))
        self._witness.see(answer.checkpoint, working=bool(ended) or work is not None)
        if ended:
            more = work is not None or len(ended) > 1
            return _settle(ended[0], wait=0.0 if more else wait)
        refused = None
        if answer.serving is not None and self._switch.due(answer.serving):
            step = self._serve(answer.serving, wait=0.0 if work is not None else wait)
            if step.outcome is StepOutcome.SERVING or work is None:
                return step
            refused = step.detail
        if work is not None:
            step = self._take(work, pending, wait=wait)
            said = "; ".join(filter(None, (step.detail, refused)))
            return replace(step, detail=said)
        if answer.unreadable is not None:
            reason = answer.unable or ""
            self._client.decline(answer.unreadable, reason)
            return Step(StepOutcome.DECLINED, wait, detail=reason)
        if pending:
            return _not_over(pending[0][1].round, wait)
        over = answer.run_state in _ENDED_RUNS
        outcome = StepOutcome.FINISHED if over else StepOutcome.WAITING
        return Step(outcome, wait, detail=answer.unable or "")

    def _check_in(self, pending: Sequence[Tentative]) -> CheckInAnswer:
        asked = [tentative.assignment for tentative in pending]
        return self._client.check_in(
            asked[0] if asked else None,
            __version__,
            encodings=ENCODINGS,
            versions=self._folder.versions(),
            waiting=asked[1:],
            kinds=self._kinds,
        )

    def _pause(self, answer: CheckInAnswer) -> float:
        return self._rng.uniform(answer.retry_after_min, answer.retry_after_max)

    def _serve(self, wanted: Serving, *, wait: float) -> Step:
        """Serve what the coordinator says; what cannot be served leaves all as it was, and holds
        back nothing else.
        """
        which = f"version {wanted.version.number} of {wanted.channel}"
        try:
            self._switch.to(wanted)
        except (*_UNABLE, ServiceError) as error:
            self._switch.failed(wanted, may_pass=isinstance(error, ServiceError))
            return Step(StepOutcome.WAITING, wait, detail=f"{which} is not served: {error}")
        return Step(StepOutcome.SERVING, wait, detail=which)

    # --- tentative work ------------------------------------------------------------------------

    def _take(
        self, work: Assignment, pending: Sequence[tuple[Arm, Tentative]], *, wait: float
    ) -> Step:
        """Deliver what is tentative already, or do new work of an arm in which nothing is."""
        for arm, tentative in pending:
            if tentative.assignment == work.id:
                return self._deliver(arm, work, tentative=tentative, wait=wait)
        arm = self._folder.arm(work.arm_id)
        if arm.record.tentative is not None:
            return _not_over(arm.record.tentative.round, wait)
        return self._do(arm, work, wait)

    def _deliver(self, arm: Arm, work: Assignment, *, tentative: Tentative, wait: float) -> Step:
        """Send the update and complete it; what was sent before a restart is not sent again."""
        again = 0
        try:
            upload = tentative.upload
            if upload is None:
                file, found = arm.update(tentative)
                ticket = self._client.reserve_update(work.id, found)
                again = max(0, self._client.put_file(ticket, file) - file.size)
                tentative, upload = arm.sent(tentative, ticket.id), ticket.id
            self._client.complete(upload)
        except ServiceError as error:
            # The next check-in tells whether the assignment is over or the file is wanted again.
            if error.status not in TRANSIENT:
                arm.unsent(tentative)
            if error.status in _INVALID and error.code != STORE_REFUSED:
                return self._decline(work, str(error), wait=wait)
            raise
        said = f"{again} bytes were sent again" if again else ""
        return Step(StepOutcome.TRAINED, wait, tentative.round, said)

    # --- new work ------------------------------------------------------------------------------

    def _do(self, arm: Arm, work: Assignment, wait: float) -> Step:
        done = arm.record.committed
        if done is not None and done.assignment == work.id:
            return Step(StepOutcome.WAITING, wait, work.round, "this assignment is committed")
        try:
            self._check_space(work)
            arm.keep_run(work.run)
            if work.kind == "train":
                return self._deliver(arm, work, tentative=self._train(arm, work), wait=wait)
            if work.kind == "ablate":
                self._scorer.ablate(arm, work)
                return Step(StepOutcome.ABLATED, wait)
            self._scorer.evaluate(arm, work)
            return Step(StepOutcome.EVALUATED, wait)
        except _UNABLE as error:
            return self._decline(work, str(error), wait=wait)

    def _check_space(self, work: Assignment) -> None:
        ours = self._learner.space.digest
        if ours != work.space_digest:
            raise SpaceError(
                f"this task's model has parameter space {ours[:12]}…, run {work.run.name!r} needs "
                f"{work.space_digest[:12]}…; start the agent with the task of that run",
                code="space_mismatch",
            )

    def _train(self, arm: Arm, work: Assignment) -> Tentative:
        if work.round is None:
            raise TrainingError("an assignment to train needs a round")
        base = self._versions.base(arm, work)
        settings = work.run.settings
        before = self._committed(arm)
        done = self._learner.participate(
            before, base, settings=settings, seed=derive_seed(settings, self._name, work.round)
        )
        delivery, meta = _described(work, done, number=work.round)
        held = work.mask
        same = before is not None and held is not None and before.merge_mask.digest == held.sha256
        update, state = write_update(
            meta,
            done,
            base=base,
            before=before,
            known=before.merge_mask if before is not None and same else None,
            send_mask=held is None or held.version != meta.mask_version,
        )
        held_work = arm.hold(delivery, state=state.pieces(self._learner.space), update=update)
        self._recent = (held_work.state.sha256, state)
        return held_work

    def _committed(self, arm: Arm) -> PersonalState | None:
        """The state that counts; as it was made, if this process made it last."""
        committed = arm.record.committed
        if committed and self._recent and self._recent[0] == committed.state.sha256:
            return self._recent[1]
        return arm.committed(self._learner.space)

    def _decline(self, work: Assignment, reason: str, *, wait: float) -> Step:
        self._client.decline(work.id, reason)
        return Step(StepOutcome.DECLINED, wait, work.round, reason)


def _described(
    work: Assignment, done: Participation, *, number: int
) -> tuple[Delivery, UpdateMeta]:
    """What the update is; the mask is sent, under the next number, if another one is held."""
    held = work.mask
    changed = held is None or held.sha256 != done.mask.digest
    version = (held.version if held else 0) + changed
    meta = UpdateMeta(
        space=work.space_digest,
        run=str(work.run.id),
        round=number,
        assignment=str(work.id),
        base_version=work.base.sha256,
        mask_version=version,
        examples=work.run.settings.disclosure.count(done.examples),
        encoding=work.run.settings.wire.encoding,
    )
    delivery = Delivery(
        assignment=work.id,
        round=number,
        mask_version=version,
        mask_sha256=done.mask.digest,
        base=work.base.sha256,
    )
    return delivery, meta


def _is_final(error: ServiceError) -> bool:
    """Whether the coordinator itself turns this client away for good."""
    passing = error.code in {STORE_REFUSED, "client_suspended"} or error.code.startswith("http_")
    return error.status in {401, 403} and not passing


def _not_over(number: int, wait: float) -> Step:
    return Step(StepOutcome.WAITING, wait, number, "the round is not over")


def _settle(end: outcomes.End, *, wait: float) -> Step:
    tentative, outcome = end.tentative, end.outcome
    if end.counts:
        end.arm.commit(tentative)
        return Step(StepOutcome.COMMITTED, wait, tentative.round)
    end.arm.discard()
    state = outcome.round_state.value if outcome.round_state else "unknown"
    detail = f"the update is {outcome.state.value}, its round {state}"
    if outcome.reason:
        detail += f": {outcome.reason}"
    return Step(StepOutcome.DISCARDED, wait, tentative.round, detail)
