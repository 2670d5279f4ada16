"""``fedselect pilot watch``: how a run stands, once or live in the terminal.

Owns what is asked for a look and how it is shown. Must not change anything.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedselect.amounts import duration, size
from fedselect.client import Client
from fedselect.errors import ServiceError
from fedselect.exchange import TRANSIENT
from fedselect.lifecycle import TERMINAL_ROUNDS, RunState
from fedselect.pilot import OVER, RoundRow, harmed_line, judgement, round_row, stage_line
from fedselect.protocol import RoundInfo, RunInfo
from fedselect.rolloutdocs import RolloutDetail, RolloutState

SHOWN = 12  # rounds of an arm, the newest


@dataclass(frozen=True)
class Scene:
    """How a run stands: its newest rounds, and how many clients have reported at the end."""

    run: RunInfo
    rows: list[RoundRow]
    evaluated: int
    rollout: RolloutDetail | None = None

    @property
    def over(self) -> bool:
        """Whether nothing moves by itself any more."""
        moving = self.rollout is not None and self.rollout.state is RolloutState.RUNNING
        return self.run.state in OVER and not moving

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "run": self.run.model_dump(mode="json"),
            "rounds": [asdict(row) for row in self.rows],
            "evaluated": self.evaluated,
            "rollout": self.rollout.model_dump(mode="json") if self.rollout else None,
        }


@dataclass
class Looker:
    """Looks at a run; a round that has ended is asked for once."""

    client: Client
    run_id: UUID
    ended: dict[UUID, RoundRow] = field(default_factory=dict)

    def look(self) -> Scene:
        """How the run stands now.

        Raises:
            ServiceError: the coordinator is away.
        """
        run = self.client.run(self.run_id)
        arms = {arm.id: arm.name for arm in run.arms}
        newest = list(self.client.rounds(run.id))[-SHOWN * max(1, len(arms)) :]
        rows = [self._row(each, arms) for each in newest]
        late = run.state in {RunState.EVALUATING, RunState.FINISHED}
        evaluated = len(list(self.client.evaluations(run.id))) if late else 0
        rollout = rollout_named(self.client, run.name) if run.state in OVER else None
        return Scene(run, rows, evaluated, rollout)

    def _row(self, found: RoundInfo, arms: dict[UUID, str]) -> RoundRow:
        if found.id not in self.ended:
            arm = arms.get(found.arm_id, "–") if found.arm_id else "–"
            row = round_row(self.client.round(found.id), arm)
            if found.state not in TERMINAL_ROUNDS:
                return row
            self.ended[found.id] = row
        return self.ended[found.id]


def rollout_named(client: Client, name: str) -> RolloutDetail | None:
    """The rollout of this name, if there is one."""
    found = next((each for each in client.rollouts() if each.name == name), None)
    return None if found is None else client.rollout(found.id)


def follow(looker: Looker, every: float) -> Scene:
    """Show the run until it ends or stops by itself; the coordinator may be away meanwhile.

    Raises:
        ServiceError: refused, which no waiting mends.
        typer.Exit: with 130, the view was ended.
    """
    console = Console(emoji=False, highlight=False)
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        try:
            scene = _until_over(looker, every, live)
        except KeyboardInterrupt:
            typer.echo("The run goes on.", err=True)
            raise typer.Exit(130) from None
    show(scene)
    return scene


def _until_over(looker: Looker, every: float, live: Live) -> Scene:
    scene, away = None, 0.0
    while True:
        try:
            scene, away = looker.look(), 0.0
            live.update(picture(scene))
            if scene.over:
                return scene
        except ServiceError as error:
            if error.status not in TRANSIENT:
                raise
            away = away or time.monotonic()
            note = f"The coordinator does not answer ({time.monotonic() - away:.0f} s); asking on."
            live.update(Group(*([picture(scene)] if scene else []), Text(note, style="yellow")))
        time.sleep(every)


def show(scene: Scene) -> None:
    """Print how it stands."""
    console = Console(emoji=False, highlight=False)
    for table in _tables(scene):
        console.print(table)
    console.print(Text(_end(scene)), soft_wrap=True)  # so that its command can be copied


def picture(scene: Scene) -> Group:
    """The rounds as a table, and a line about the run."""
    return Group(*_tables(scene), Text(_end(scene)))


def _tables(scene: Scene) -> list[Table]:
    """The rounds; once there is a rollout, what its gates say of the present stage."""
    found = scene.rollout
    if found is None:
        return [_rounds(scene)]
    title = f"{scene.run.name}: rollout {found.state.value.replace('_', ' ')}, {stage_line(found)}"
    table = Table(title=title, title_justify="left", box=None)
    for name in ("gate", "verdict", "figure", "limit", "stage", "control"):
        table.add_column(name, justify="left" if name in {"gate", "verdict"} else "right")
    judged = judgement(found)
    for gate in judged.gates if judged else ():
        limit = f"{'≥' if gate.keeps == 'at least' else '≤'} {gate.limit:g}"
        figure = "–" if gate.figure is None else f"{gate.figure:.3g}"
        groups = [f"n = {each.clients}" if each else "–" for each in (gate.stage, gate.control)]
        table.add_row(gate.gate.replace("_", " "), gate.verdict.value, figure, limit, *groups)
    return [table]


def _rounds(scene: Scene) -> Table:
    run = scene.run
    done = ", ".join(f"{arm.name} {arm.published}" for arm in run.arms)
    heading = f"{run.name}: {run.state.value}, of {run.settings.rounds} rounds {done}"
    table = Table(title=heading, title_justify="left", box=None)
    for name in ("policy", "round", "state", "clients", "sent", "received", "seconds", ""):
        right = name in {"round", "clients", "sent", "received", "seconds"}
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in scene.rows:
        table.add_row(*(Text(cell) for cell in _cells(row)))
    return table


def _cells(row: RoundRow) -> tuple[str, ...]:
    number = f"{row.number}" if row.attempt == 1 else f"{row.number} ({row.attempt})"
    seconds = "–" if row.seconds is None else duration(row.seconds)
    clients = f"{row.delivered}/{row.assigned}"
    reason = "" if row.state == "published" else row.reason or ""
    return (
        row.arm,
        number,
        row.state,
        clients,
        size(row.sent),
        size(row.received),
        seconds,
        _shown(reason),
    )


def _shown(text: str) -> str:
    """What others wrote must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _end(scene: Scene) -> str:
    run, rollout = scene.run, scene.rollout
    if rollout is not None:
        answered = sum(each.evaluation == "accepted" for each in rollout.members)
        if rollout.state is RolloutState.RUNNING:
            return f"{answered} of {len(rollout.members)} clients of the stage have answered."
        judged, why = judgement(rollout), _shown(rollout.reason)
        if judged and any(gate.text in why for gate in judged.gates):  # they stand in the table
            why = why.partition(":")[0]
        text = f"Rollout {rollout.state.value.replace('_', ' ')}: {why}."
        waits = rollout.state in {RolloutState.PASSED, RolloutState.HELD}
        text += " Next: fedselect pilot promote, or pilot rollback" if waits else ""
        harmed = harmed_line(rollout)
        return f"{_shown(harmed)}\n{text}" if harmed else text
    if run.state is RunState.FINISHED:
        return f"Finished; {scene.evaluated} clients have reported. Next: fedselect pilot report"
    if run.state is RunState.EVALUATING:
        return f"All rounds are published; {scene.evaluated} clients have reported."
    if run.state is RunState.PAUSED:
        return f"Paused: {run.reason}. Go on: fedselect admin runs resume {run.id}"
    if run.state is RunState.STOPPED:
        return f"Stopped: {run.reason or 'by an administrator'}."
    return ""
