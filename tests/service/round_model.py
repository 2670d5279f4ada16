"""What a run does, once more and small: the model that ``test_stateful`` holds the service against.

It knows no HTTP and no rows, and shares no code with ``fedselect.lifecycle``. Time is a number of
seconds; one client gets one attempt in a round.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

GATHERING = {"selecting", "collecting"}
OVER = {"published", "abandoned", "cancelled"}


@dataclass
class RoundModel:
    number: int
    attempt: int
    opened: float
    state: str = "selecting"
    places: dict[int, str] = field(default_factory=dict)  # client → state of its assignment

    def row(self) -> tuple[int, int, str]:
        return self.number, self.attempt, self.state


@dataclass
class RunModel:
    """A run with its rounds; ``selection`` and ``reporting`` are the two deadlines."""

    clients: int
    goal: int
    quorum: int
    wanted: int
    rounds: int
    tries: int
    selection: float
    reporting: float
    now: float = 0
    state: str = "running"
    history: list[RoundModel] = field(default_factory=list)
    reported: set[int] = field(default_factory=set)
    evaluating_since: float = 0

    def __post_init__(self) -> None:
        self._open(1)

    @property
    def last(self) -> RoundModel:
        return self.history[-1]

    @property
    def active(self) -> RoundModel | None:
        return None if self.last.state in OVER else self.last

    @property
    def published(self) -> int:
        return sum(r.state == "published" for r in self.history)

    def gathers(self) -> bool:
        before = self.now < self.last.opened + self.selection + self.reporting
        return self.last.state in GATHERING and before

    # --- what clients do -------------------------------------------------------------------------

    def check_in(self, client: int) -> str | None:
        """The kind of work that the client gets, if any."""
        if self.state == "evaluating":
            return None if client in self.reported else "evaluate"
        current = self.last
        if self.gathers() and current.places.get(client) in {"assigned", "reserved"}:
            return "train"
        open_door = current.state == "selecting" and self.now < current.opened + self.selection
        if client in current.places or not open_door or self.state != "running":
            return None
        current.places[client] = "assigned"
        if len(current.places) >= self.wanted:
            current.state = "collecting"
        return "train"

    def decline(self, client: int) -> bool:
        if self.last.places.get(client) not in {"assigned", "reserved"}:
            return False
        self.last.places[client] = "declined"
        self.look()
        return True

    def report(self, client: int) -> None:
        self.reported.add(client)
        if len(self.reported) == self.clients:
            self.state = "finished"

    # --- what workers do -------------------------------------------------------------------------

    def verified(self, client: int, honest: bool) -> None:
        if self.last.places[client] == "uploaded":
            self.last.places[client] = "accepted" if honest else "rejected"
            self.look()

    def summed(self) -> None:
        self._end("published")

    # --- time and the administrator --------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.look()
        if self.state == "evaluating" and self.now >= self.evaluating_since + self.reporting:
            self.state = "finished"

    def order(self, name: str) -> bool:
        allowed = {"pause": {"running"}, "resume": {"paused"}}
        if self.state not in allowed.get(name, {"running", "paused", "evaluating"}):
            return False
        self.state = {"pause": "paused", "resume": "running", "stop": "stopped"}[name]
        if name == "stop" and self.active is not None:
            self._end("cancelled")
        if name == "resume" and self.active is None:
            self._open(1 + sum(r.number == self.published + 1 for r in self.history))
        return True

    def cancel(self) -> bool:
        if self.active is None:
            return False
        self._end("cancelled")
        return True

    # --- what follows ----------------------------------------------------------------------------

    def look(self) -> None:
        """A round looks at itself after every settled assignment and every tick."""
        current = self.last
        if current.state not in GATHERING:
            return None
        counts = Counter(current.places.values())
        accepted, still_open = counts["accepted"], counts["assigned"] + counts["reserved"]
        if current.state == "selecting" and accepted < self.goal:
            if self.now < current.opened + self.selection:
                return None
            enough = len(current.places) >= self.quorum
            current.state = "collecting" if enough else current.state
            return None if enough else self._end("abandoned")
        if counts["uploaded"]:
            return None
        waiting = still_open and self.now < current.opened + self.selection + self.reporting
        if accepted < self.goal and waiting:
            return None
        return self._aggregate() if accepted >= self.quorum else self._end("abandoned")

    def _aggregate(self) -> None:
        self.last.state = "aggregating"
        self._close("rejected")

    def _close(self, uploaded: str) -> None:
        ends = {"assigned": "expired", "reserved": "expired", "uploaded": uploaded}
        self.last.places = {c: ends.get(state, state) for c, state in self.last.places.items()}

    def _end(self, how: str) -> None:
        ended = self.last
        ended.state = how
        self._close("rejected")
        if how == "published" and ended.number >= self.rounds:
            self.state, self.evaluating_since = "evaluating", self.now
        elif self.state == "running" and how == "published":
            self._open(1)
        elif self.state == "running" and how == "abandoned" and ended.attempt < self.tries:
            self._open(ended.attempt + 1)
        elif self.state == "running":
            self.state = "paused"

    def _open(self, attempt: int) -> None:
        self.history.append(RoundModel(self.published + 1, attempt, self.now))
