"""The ``fedselect pilot`` commands: one file, from a few clients to all of them.

Owns what the commands do with a pilot's file over the HTTP interface, and their words. The
questions of ``init`` are ``pilotquestions_cli``, the live view ``pilotwatch_cli``, the rules
``pilot``. Must not keep a state of its own: a pilot's run is the one of its name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console

from fedselect import comparison, comparisonpage, pilot, pilotquestions_cli, pilotwatch_cli
from fedselect.client import Client, Retries
from fedselect.cohortdocs import ChannelMove, CohortCreate, CohortInfo, Justified
from fedselect.errors import FedSelectError, ServiceError
from fedselect.lifecycle import RunState
from fedselect.personal import write_atomically
from fedselect.pilotfile import PilotFile, parse, schema
from fedselect.protocol import ArmInfo, ModelInfo, RunCreate, RunInfo, VersionInfo
from fedselect.remote import Given, add, connect, group, valid
from fedselect.reportpage import page
from fedselect.reporttable import table
from fedselect.rolloutdocs import RolloutDetail, RolloutState

Work = TypeVar("Work", bound=Callable[..., None])
File = Annotated[Path, typer.Argument(metavar="FILE", help="The pilot's file.")]
Reason = Annotated[str, typer.Option(prompt="Why", help="For the ledger.")]
DEFAULT = Path("pilot.yaml")

app = group("Try it with a few clients first, then roll it out.")
pilotquestions_cli.register(app)


@dataclass(frozen=True)
class Talk:
    """One command's pilot, its coordinator, and how to answer."""

    client: Client
    file: PilotFile
    as_json: bool

    def say(self, document: Any, *lines: str) -> None:
        """Print a document for programs, or lines for people."""
        if self.as_json:
            typer.echo(json.dumps(document, default=_document))
            return
        console = Console(emoji=False, highlight=False, markup=False, soft_wrap=True)
        for line in lines:
            console.print(printable(line))


def _document(found: BaseModel) -> dict[str, Any]:
    return found.model_dump(mode="json")


def printable(text: str) -> str:
    """What others wrote must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def command(name: str, *, tries: int | None = None) -> Callable[[Work], Work]:
    """Make a command of ``work(talk, file, …)``; ``tries`` of each call, by default a few."""

    def decorate(work: Work) -> Work:
        def run(given: Given, as_json: bool, **options: Any) -> None:
            found = read(options["file"])
            retries = Retries(random.SystemRandom(), tries=tries) if tries else None
            with connect(where(given, found), retries=retries) as client:
                work(Talk(client, found, as_json), **options)

        add(app, name, run, like=work)
        return work

    return decorate


def read(path: Path) -> PilotFile:
    """The pilot in a file.

    Raises:
        FedSelectError: file_invalid, pilot_file_invalid.
    """
    try:
        return parse(path.read_text("utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text"
        raise FedSelectError(
            f"{path} cannot be read ({why}); `fedselect pilot init {path}` writes one",
            code="file_invalid",
        ) from error


def where(given: Given, found: PilotFile) -> Given:
    """Where to: what is typed, else what the file says."""
    named = given.profile or given.server_typed
    project = str(found.project) if found.project else None
    return replace(
        given,
        profile=given.profile if named else found.profile,
        project=given.project or project,
    )


@app.command("schema")
def show_schema() -> None:
    """Print the form of a pilot's file as a JSON schema, for editors."""
    typer.echo(schema(), nl=False)


# --- start -------------------------------------------------------------------------------------


@command("start")
def start(talk: Talk, file: File = DEFAULT) -> None:
    """Begin a pilot, or go on with it; the same file twice is the same pilot."""
    client, wanted = talk.client, talk.file
    model = model_named(client, wanted.model)
    run = run_named(client, wanted.name)
    made = run is None
    cohort = _cohort(client, wanted)
    if run is None:
        _check_size(cohort, wanted)
        run = _create(client, wanted, model, cohort)
    _check_same(wanted, run, model, cohort)
    if run.state is RunState.CREATED:
        run = client.start_run(run.id)
    elif run.state is RunState.PAUSED:
        raise FedSelectError(
            f"the run is paused: {run.reason}; look at it, then: fedselect admin runs resume "
            f"{run.id}",
            code="pilot_paused",
        )
    words = f"started with {cohort.members} of the clients"
    if not made:
        words = f"there already: its run is {run.state.value}, {run.published} of "
        words += f"{run.settings.rounds} rounds are published"
    talk.say(
        {"created": made, "run": run, "cohort": cohort},
        f"{wanted.name} is {words}.",
        f"Look on: fedselect pilot watch {file}",
    )


def _cohort(client: Client, wanted: PilotFile) -> CohortInfo:
    """The pilot's cohort, made if it is not there.

    Raises:
        FedSelectError: pilot_changed: there is one of other clients.
    """
    found = _cohort_named(client, wanted.name)
    if found is None:
        try:
            return client.create_cohort(CohortCreate(name=wanted.name, rule=wanted.cohort))
        except ServiceError as error:
            found = (
                _cohort_named(client, wanted.name) if error.code == "cohort_name_taken" else None
            )
            if found is None:
                raise
    if found.rule != wanted.cohort:
        raise _changed(wanted, "cohort", ["rule"])
    return found


def _cohort_named(client: Client, name: str) -> CohortInfo | None:
    return next((each for each in client.cohorts() if each.name == name), None)


def _check_size(cohort: CohortInfo, wanted: PilotFile) -> None:
    """Refuse rounds that would wait for clients that there are not."""
    if cohort.members < wanted.round.goal:
        raise FedSelectError(
            f"the cohort has {cohort.members} active clients, but round.goal is "
            f"{wanted.round.goal}: lower goal (and quorum) in the file, or give the pilot another "
            "name and more clients",
            code="pilot_cohort_small",
        )


def _create(client: Client, wanted: PilotFile, model: ModelInfo, cohort: CohortInfo) -> RunInfo:
    asked = RunCreate(
        name=wanted.name, model_id=model.id, settings=wanted.settings(), cohort_id=cohort.id
    )
    try:
        return client.create_run(asked)
    except ServiceError as error:
        found = run_named(client, wanted.name) if error.code == "run_name_taken" else None
        if found is None:
            raise
        return found  # another terminal was faster


def _check_same(wanted: PilotFile, run: RunInfo, model: ModelInfo, cohort: CohortInfo) -> None:
    unlike = pilot.differences(wanted, run)
    unlike += ["model"] if run.model_id != model.id else []
    unlike += ["cohort"] if run.cohort_id != cohort.id else []
    if unlike:
        raise _changed(wanted, "run", unlike)


def _changed(wanted: PilotFile, what: str, unlike: list[str]) -> FedSelectError:
    return FedSelectError(
        f"there is a {what} {wanted.name!r} already, of other settings ({', '.join(unlike)}); "
        "what has begun stays as it is: give the pilot another name",
        code="pilot_changed",
    )


def model_named(client: Client, name: str) -> ModelInfo:
    """The model of this name.

    Raises:
        FedSelectError: pilot_model_unknown.
    """
    known = {each.name: each for each in client.models()}
    if name not in known:
        raise FedSelectError(
            f"there is no model {name!r}; there are: {', '.join(sorted(known)) or 'none'}",
            code="pilot_model_unknown",
        )
    return known[name]


def run_named(client: Client, name: str) -> RunInfo | None:
    """The run of this name, if there is one."""
    return next((each for each in client.runs() if each.name == name), None)


def begun(talk: Talk, file: Path) -> RunInfo:
    """The pilot's run.

    Raises:
        FedSelectError: pilot_not_started.
    """
    run = run_named(talk.client, talk.file.name)
    if run is None:
        raise FedSelectError(
            f"{talk.file.name} has not begun; begin: fedselect pilot start {file}",
            code="pilot_not_started",
        )
    return run


# --- watch, report -----------------------------------------------------------------------------

Once = Annotated[bool, typer.Option("--once", help="Show how it stands, and end.")]
Every = Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")]
Arm = Annotated[str | None, typer.Option(help="A policy; by default the one to use.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the files; by default beside FILE.")]


@command("watch", tries=1)
def watch(talk: Talk, file: File = DEFAULT, once: Once = False, every: Every = 1.0) -> None:
    """Look on until the run ends; Ctrl-C ends the view, not the run."""
    looker = pilotwatch_cli.Looker(talk.client, begun(talk, file).id)
    if once or talk.as_json:
        scene = looker.look()
        talk.say(scene.document()) if talk.as_json else pilotwatch_cli.show(scene)
        return
    scene = pilotwatch_cli.follow(looker, every)
    if scene.run.state is not RunState.FINISHED:
        raise typer.Exit(1)


@command("report")
def report(talk: Talk, file: File = DEFAULT, arm: Arm = None, out: Out = None) -> None:
    """Say who gained, who lost, what it cost; write it as HTML, JSON and CSV."""
    run = begun(talk, file)
    compared = talk.client.comparison(run.id) if len(run.arms) > 1 else None
    chosen = arm or (compared.recommendation.policy if compared else None)
    found = talk.client.run_report(run.id, arm=chosen)
    folder, name = out or file.parent, talk.file.name
    paths = _write(folder, name, found, page=page(found), table=table(found))
    rollout = pilotwatch_cli.rollout_named(talk.client, name)
    lines = pilot.summary(found, pilot.gates_line(rollout))
    document: dict[str, Any] = {
        "summary": lines,
        "files": paths,
        "report": found,
        "rollout": rollout,
    }
    said = [*lines, f"In full: {paths['html']}"]
    if compared is not None:
        texts = {"page": comparisonpage.page(compared), "table": comparison.table(compared)}
        others = _write(folder, f"{name}.comparison", compared, **texts)
        advice = f"Policies: {pilot.advice(compared.recommendation)}"
        said = [advice, *said, f"All policies: {others['html']}"]
        document |= {"advice": advice, "comparison": compared, "comparison_files": others}
    talk.say(document, *said)


def _write(folder: Path, name: str, found: BaseModel, *, page: str, table: str) -> dict[str, str]:
    texts = {"html": page, "json": found.model_dump_json(indent=2), "csv": table}
    paths = {kind: (folder / f"{name}.{kind}").resolve() for kind in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, path in paths.items():
            write_atomically(path, texts[kind].encode())
    except OSError as error:
        raise FedSelectError(
            f"{folder} takes no report: {error.strerror}", code="file_invalid"
        ) from error
    return {kind: str(path) for kind, path in paths.items()}


# --- promote, rollback -------------------------------------------------------------------------

Anyway = Annotated[bool, typer.Option("--anyway", help="Although a gate failed.")]


@command("promote")
def promote(
    talk: Talk, reason: Reason, file: File = DEFAULT, arm: Arm = None, anyway: Anyway = False
) -> None:
    """Begin to bring what came of it to everybody, or go on to the next stage."""
    order = valid(Justified, reason=reason)
    found = pilotwatch_cli.rollout_named(talk.client, talk.file.name)
    if found is None:
        found = _begin(talk, begun(talk, file), arm, reason)
        notes = found.notes
    else:
        why = pilot.blocked(found, anyway=anyway)
        if why is not None:
            raise FedSelectError(f"{talk.file.name}: {why}", code="pilot_not_promoted")
        found, notes = talk.client.promote_rollout(found.id, order), []
    words = found.state.value.replace("_", " ")
    lines = [f"Rollout {words}: {pilot.stage_line(found)}.", *notes]
    if found.state is RolloutState.RUNNING:
        lines.append(f"Its clients measure it now: fedselect pilot watch {file}")
    talk.say({"rollout": found}, *lines)


def _begin(talk: Talk, run: RunInfo, arm: str | None, reason: str) -> RolloutDetail:
    """Open the rollout of the last version.

    Raises:
        FedSelectError: pilot_not_finished, pilot_arm.
    """
    client = talk.client
    if run.state is not RunState.FINISHED:
        raise FedSelectError(
            f"the run is {run.state.value}; a rollout begins with a finished one: fedselect pilot "
            "watch",
            code="pilot_not_finished",
        )
    chosen = _arm(client, run, arm)
    versions = [each for each in client.versions(run.id) if each.arm_id == chosen.id]
    last = max(versions, key=lambda each: each.number)
    _point(client, run, min(versions, key=lambda each: each.number), reason)
    asked = talk.file.rollout.request(run.name, run.model_id, last.id, reason)
    rollout = client.start_rollout(asked)
    return client.rollout(rollout.id)


def _arm(client: Client, run: RunInfo, wanted: str | None) -> ArmInfo:
    """The arm to roll out: the one that is named, the only one, or the recommended one."""
    if wanted is None and len(run.arms) > 1:
        wanted = client.comparison(run.id).recommendation.policy
    known = {each.name: each for each in run.arms}
    if wanted is None and len(known) == 1:
        return run.arms[0]
    if wanted is None or wanted not in known:
        raise FedSelectError(
            f"which policy? Name one with --arm; there are: {', '.join(known)}", code="pilot_arm"
        )
    return known[wanted]


def _point(client: Client, run: RunInfo, start: VersionInfo, reason: str) -> None:
    """A model that was never given out: what everybody has is what the pilot started from."""
    if all(each.name != "stable" for each in client.channels(run.model_id)):
        why = f"what everybody has before the pilot {run.name}: {reason}"
        move = ChannelMove(version_id=start.id, reason=why[:500])
        client.move_channel(run.model_id, "stable", move)


@command("rollback")
def rollback(
    talk: Talk,
    reason: Reason,
    file: File = DEFAULT,  # noqa: ARG001 - read for `talk`, as in every command
) -> None:
    """Bring everybody back to the version before, shared and personal halves together."""
    client, name, why = talk.client, talk.file.name, valid(Justified, reason=reason)
    found = pilotwatch_cli.rollout_named(client, name)
    if found is None:
        raise FedSelectError(
            f"{name} was never promoted, so there is nothing to take back",
            code="pilot_not_promoted",
        )
    if found.state is RolloutState.PROMOTED:
        _take_back(client, found, why)
    elif found.state is not RolloutState.ROLLED_BACK:  # told twice, it is done once
        found = client.roll_rollout_back(found.id, why)
    talk.say({"rollout": found}, f"{name} is rolled back: everybody serves the version before.")


def _take_back(client: Client, found: RolloutDetail, why: Justified) -> None:
    """After the last stage the channel has moved: move it back, unless it has moved on."""
    channel = client.channel(found.model_id, "stable")
    if channel.version.id == found.old_version_id:
        return
    if channel.version.id != found.version_id:
        raise FedSelectError(
            "the channel stable has moved on since; see: fedselect admin channels show",
            code="pilot_not_promoted",
        )
    client.roll_channel_back(found.model_id, "stable", why)
