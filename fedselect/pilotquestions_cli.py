"""``fedselect pilot init``: a few questions, an estimate, and the file that they make.

Owns the questions, each of which is an option, too, and has a default. Must not start anything.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from fedselect.client import Client
from fedselect.cohortdocs import CohortRule
from fedselect.errors import FedSelectError
from fedselect.estimatedocs import EstimateCreate
from fedselect.links import link
from fedselect.personal import write_atomically
from fedselect.pilot import price
from fedselect.pilotfile import FORMAT, PilotFile, Rollout, write
from fedselect.policies import PRESETS, Arms, RoundPolicy, Training, preset
from fedselect.profiles import read_profiles
from fedselect.protocol import ClientInfo, ModelInfo
from fedselect.remote import Given, add, connect, valid
from fedselect.rolloutdocs import Gates

DEFAULT = Path("pilot.yaml")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FEW = 3  # clients of a pilot, if nobody says otherwise
MANY = 50  # clients: of more, a percentage is the better answer


@dataclass(frozen=True)
class Known:
    """What the coordinator has, and what was answered so far."""

    file: Path
    models: dict[str, ModelInfo]
    clients: list[ClientInfo]
    answers: dict[str, Any]

    def members(self) -> int:
        """How many clients the cohort has now."""
        cohort: CohortRule = self.answers["clients"]
        if cohort.clients is not None:
            return len(cohort.clients)
        if cohort.tag is not None:
            return sum(cohort.tag in each.tags for each in self.clients)
        return math.ceil(round(len(self.clients) * (cohort.percent or 0) / 100, 6))


# --- the questions -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question: what is asked, the answer if none is given, and how one is read.

    ``read`` raises ``FedSelectError``; a question that needs none is not asked (``default`` None).
    """

    name: str
    text: str
    default: Callable[[Known], str | None]
    read: Callable[[str, Known], Any]

    def answer(self, given: str | None, known: Known, *, ask: bool) -> Any:
        """What was given, else what a person says, else the default."""
        default = self.default(known)
        if given is not None or default is None or not ask:
            text = given if given is not None else default
            return None if text is None else self.read(text, known)
        while True:
            try:
                return self.read(typer.prompt(self.text, default=default), known)
            except FedSelectError as error:
                typer.echo(f"  {error}")


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="answer_unfit")


def _name(text: str, _: Known) -> str:
    if NAME.fullmatch(text):
        return text
    raise _error(f"{text!r} is no name; {_spelt(text)!r} would be one")


def _spelt(text: str) -> str:
    """The nearest name."""
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", text).lstrip("-._")[:64] or "pilot"


def _model(text: str, known: Known) -> str:
    if text in known.models:
        return text
    raise _error(f"there is no model {text!r} with weights; there are: {_list(known.models)}")


def _first_model(known: Known) -> str:
    if not known.models:
        raise _error(
            "there is no model with weights yet: fedselect admin models create, then send-weights"
        )
    return list(known.models)[-1]


def _cohort(text: str, known: Known) -> CohortRule:
    """``a,b,c``, ``tag:NAME`` or ``10%``."""
    text = text.strip()
    try:
        if text.endswith("%"):
            found = CohortRule(percent=float(text[:-1]))
        elif text.startswith("tag:"):
            found = CohortRule(tag=text.removeprefix("tag:"))
        else:
            found = CohortRule(clients=_words(text))
    except (ValueError, ValidationError) as error:
        raise _error(
            f"{text!r} names no clients: write names with commas, tag:NAME, or 10%"
        ) from error
    names = {each.name for each in known.clients}
    missing = sorted(set(found.clients or ()) - names)
    if missing:
        raise _error(f"there is no active client {_list(missing)}; there are: {_list(names)}")
    if found.tag is not None and not any(found.tag in each.tags for each in known.clients):
        tags = {tag for each in known.clients for tag in each.tags}
        raise _error(f"no active client has the tag {found.tag!r}; there are: {_list(tags)}")
    return found


def _few(known: Known) -> str:
    if not known.clients:
        raise _error("there is no active client yet: fedselect admin clients enrol")
    if len(known.clients) > MANY:
        return "10%"
    return ",".join(sorted(each.name for each in known.clients)[:FEW])


def _policies(text: str, _: Known) -> list[str]:
    names = _words(text)
    unknown = [name for name in names if name not in PRESETS]
    if unknown or not names or len(set(names)) < len(names):
        raise _error(f"name each policy once, with commas; there are: {_list(PRESETS)}")
    return names


def _paired(known: Known) -> str | None:
    """The mode that fits so many clients; None with one policy."""
    if len(known.answers["policies"]) == 1:
        return None
    arms = Arms(policies=tuple(preset(name) for name in known.answers["policies"]))
    return arms.settled(known.members()).mode


def _compare(text: str, _: Known) -> str:
    if text not in {"parallel", "randomized"}:
        raise _error("write parallel (every client runs every policy) or randomized")
    return text


def _whole(text: str, _: Known) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 100_000:
        return int(text)
    raise _error(f"{text!r} is no number from 1 to 100,000")


def _number(text: str, _: Known) -> float:
    try:
        return float(text)
    except ValueError:
        raise _error(f"{text!r} is no number") from None


def _stages(text: str, known: Known) -> list[float]:
    return [_number(word.removesuffix("%"), known) for word in _words(text)]


def _link(text: str, _: Known) -> str:
    link(text)
    return text


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


QUESTIONS = (
    Question("name", "Name of the pilot", lambda known: _spelt(known.file.stem), _name),
    Question("model", "Model", _first_model, _model),
    Question("clients", "Clients (names with commas, tag:NAME, or 10%)", _few, _cohort),
    Question("policies", "Policies, with commas", lambda _: "fedselect", _policies),
    Question("compare", "Compare them in parallel, or randomized", _paired, _compare),
    Question("rounds", "Rounds", lambda _: "30", _whole),
    Question("steps", "Gradient steps of a client in a round", lambda _: "20", _whole),
    Question("check_in", "Seconds between two looks for work", lambda _: "30", _number),
    Question("link", "The clients' line (10mbit, dsl, 4g)", lambda _: "10mbit", _link),
    Question("stages", "Stages of a rollout, in % of all clients", lambda _: "5,25,100", _stages),
    Question("gain", "Gate: mean gain at least, in points", lambda _: "0", _number),
    Question("harmed", "Gate: share of harmed clients at most", lambda _: "0.1", _number),
)


# --- the command -------------------------------------------------------------------------------


def register(app: typer.Typer) -> None:
    """Add ``init``; every question is an option of its own."""

    def run(given: Given, as_json: bool, **options: Any) -> None:
        file, force = options.pop("file"), options.pop("force")
        ask = not (options.pop("yes") or as_json)
        if file.exists() and not force:
            raise FedSelectError(
                f"{file} is there already; name another, or add --force", code="file_exists"
            )
        given = _profile(given, ask=ask)
        with connect(given) as client:
            known = _look(client, file)
            for question in QUESTIONS:
                answer = question.answer(options[question.name], known, ask=ask)
                known.answers[question.name] = answer
            made = _made(known, given)
            notes = _notes(client, known, made)
        write_atomically(file, write(made, notes=notes).encode())
        _tell(file, made, notes, as_json=as_json)

    add(app, "init", run, like=_signature())


def _signature() -> Callable[..., None]:
    """A function with the parameters of ``init``, for the command line to read."""

    def init(client: Client, file: Path, yes: bool, force: bool, **answers: str) -> None:
        """Ask a few questions, say what the pilot would cost, and write its file.

        Nothing is started. Every answer may be given as an option; --yes takes the defaults of all
        others, and so does --json.
        """

    kind = inspect.Parameter.KEYWORD_ONLY
    fixed: dict[str, tuple[Any, Any]] = {
        "client": (Client, None),
        "file": (Annotated[Path, typer.Argument(metavar="FILE")], DEFAULT),
        "yes": (Annotated[bool, typer.Option("--yes", help="Ask nothing.")], False),
        "force": (Annotated[bool, typer.Option("--force", help="Replace the file.")], False),
    }
    asked = {
        each.name: (Annotated[str | None, typer.Option(help=f"{each.text}.")], None)
        for each in QUESTIONS
    }
    init.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what `add` reads
        [
            inspect.Parameter(name, kind, annotation=annotation, default=default)
            for name, (annotation, default) in (fixed | asked).items()
        ]
    )
    return init


def _profile(given: Given, *, ask: bool) -> Given:
    """The profile to use, written into the file: where the pilot runs must not change later."""
    if given.profile or given.server:
        return given
    known = read_profiles(given.profiles_file.expanduser())
    name = known.default
    if ask and len(known.profiles) > 1:
        name = typer.prompt(f"Profile ({_list(known.profiles)})", default=name)
    return replace(given, profile=name)


def _look(client: Client, file: Path) -> Known:
    models = {each.name: each for each in client.models() if each.initial_version is not None}
    clients = [each for each in client.clients() if each.state == "active"]
    return Known(file, models, clients, {})


def _made(known: Known, given: Given) -> PilotFile:
    said, members = known.answers, known.members()
    return valid(
        PilotFile,
        format=FORMAT,
        name=said["name"],
        profile=given.profile,
        project=given.project,
        model=said["model"],
        cohort=said["clients"],
        policies=said["policies"],
        compare=said["compare"] or "parallel",
        rounds=said["rounds"],
        training=Training(steps=said["steps"]),
        round=_round(said["clients"], members, said["check_in"]),
        link=said["link"],
        rollout=valid(
            Rollout,
            stages=said["stages"],
            minimum=min(FEW, max(1, len(known.clients) // 2)),
            gates=valid(Gates, mean_gain=said["gain"], harmed_share=said["harmed"]),
        ),
    )


def _round(cohort: CohortRule, members: int, check_in: float) -> RoundPolicy:
    """Everybody of a named group is wanted, and a third of them may be away.

    A percentage is of all clients by a hash: how many these are is known when it is drawn.
    """
    goal = max(1, members * 2 // 3) if cohort.percent is not None else max(1, members)
    return valid(
        RoundPolicy,
        goal=goal,
        quorum=max(1, goal - goal // 3),
        over_selection=1.0,
        min_contributors=min(2, goal),
        retry_after=check_in,
    )


def _notes(client: Client, known: Known, made: PilotFile) -> list[str]:
    """What it would cost."""
    asked = EstimateCreate(
        model_id=known.models[made.model].id,
        settings=made.settings(),
        clients=known.members(),
        links=[made.link],
    )
    said = price(client.make_estimate(asked))
    return [f"Estimate for {known.members()} clients, made with this file:", *said]


def _tell(file: Path, made: PilotFile, notes: list[str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(
            json.dumps(
                {"file": str(file), "pilot": made.model_dump(mode="json"), "estimate": notes}
            )
        )
        return
    for note in notes:
        typer.echo(note)
    typer.echo(f"Nothing has begun. Read {file}, then: fedselect pilot start {file}")
