"""The other side with several arms: a coordinator for each, one check-in for all."""

from __future__ import annotations

from uuid import UUID

import httpx

from fedselect import checkindocs
from fedselect.lifecycle import RoundState, RunState

from .fake_coordinator import ARM, OPEN, Coordinator, Row, answer, problem
from .fake_ledger import Ledger

R = RoundState


class Arms:
    """Rounds of all arms go on side by side; the one that is behind is given first."""

    def __init__(self, *arms: Coordinator) -> None:
        self.arms = arms
        self.seen: list[httpx.Request] = []
        self.check_ins: list[checkindocs.CheckIn] = []
        self.ledger = Ledger()
        self.forgotten: set[UUID] = set()

    @property
    def clients(self) -> dict[str, str]:
        return self.arms[0].clients

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        words = request.url.path.strip("/").split("/")
        if request.url.host == "store.test":
            return self.arms[int(words[0].partition("-")[2] or 0)](request)
        match words[1:]:
            case ["check-ins"]:
                body = checkindocs.CheckIn.model_validate_json(request.content)
                self.check_ins.append(body)
                return self._check_in(body)
            case ["ledger", *rest]:
                return self.ledger.answer(rest, request.url.params)
            case ["versions", version, _]:
                return self.arms[int(UUID(version)) // ARM](request)
            case ["assignments" | "uploads", row, _]:
                return next(a for a in self.arms if any(str(r.id) == row for r in a.rows))(request)
        return self.arms[0](request)

    def _check_in(self, body: checkindocs.CheckIn) -> httpx.Response:
        for arm in self.arms:
            arm._progress()
        rows = {r.id: r for arm in self.arms for r in arm.rows if r.id not in self.forgotten}
        if body.pending and body.pending not in rows:
            return problem(404, "not_found")
        waiting = [rows[each] for each in body.waiting or () if each in rows]
        work = self._work(body)
        return answer(
            200,
            checkindocs.CheckInAnswer(
                assignment=work and work[0]._document(work[1], body.versions),
                pending=_outcome(rows[body.pending]) if body.pending else None,
                outcomes=[_outcome(row) for row in waiting],
                retry_after_min=2,
                retry_after_max=6,
                checkpoint=self.ledger.head(2 * sum(len(a.published) for a in self.arms) + 1),
                run_state=self._run_state(),
            ),
        )

    def _run_state(self) -> RunState:
        ended = all(arm.run_state is RunState.FINISHED for arm in self.arms)
        return RunState.FINISHED if ended else RunState.RUNNING

    def _work(self, body: checkindocs.CheckIn) -> tuple[Coordinator, Row] | None:
        through = all(len(arm.published) == arm.rounds for arm in self.arms)
        order = sorted(self.arms, key=lambda arm: (not _given(arm), len(arm.published), arm.arm))
        busy = any(_waits(arm) for arm in self.arms)
        for arm in order:
            ready = through or len(arm.published) < arm.rounds
            if ready and not _waits(arm) and (body.waiting is not None or not busy):
                row = arm._work()
                if row is not None:
                    return arm, row
        return None


def _given(arm: Coordinator) -> bool:
    return bool(arm.rows and arm.rows[-1].state in OPEN and arm.rows[-1].kind == "train")


def _waits(arm: Coordinator) -> bool:
    last = arm.rows[-1] if arm.rows else None
    return last is not None and last.round_state in {R.AGGREGATING, R.FAILED}


def _outcome(row: Row) -> checkindocs.Outcome:
    return checkindocs.Outcome(
        assignment_id=row.id, state=row.state, round_state=row.round_state, reason=row.reason
    )
