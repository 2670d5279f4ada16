"""A command over the HTTP interface: its options, its connection, what it prints.

Owns what all commands of ``admin`` share: a function takes a client and its own arguments, and
gives a document or a list of them; :func:`command` makes a command of it. Must not know any call.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from uuid import UUID

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedselect.client import Client, Retries
from fedselect.errors import FedSelectError
from fedselect.keyoption import from_environment, typed
from fedselect.profiles import Profile, read_key, read_profiles

PROFILES = Path("~/.config/fedselect/profiles.toml")
LOCAL = Path(".fedselect/profiles.toml")  # of the local stack, written by `fedselect up`
PANEL = "Where to"
Document = TypeVar("Document", bound=BaseModel)
Work = TypeVar("Work", bound=Callable[..., Any])


Name = Annotated[
    str | None,
    typer.Option(
        "--profile", envvar="FEDSELECT_PROFILE", help="Of profiles.toml.", rich_help_panel=PANEL
    ),
]
Server = Annotated[
    str | None,
    typer.Option(envvar="FEDSELECT_SERVER", help="https://host:port", rich_help_panel=PANEL),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File with a key, mode 600; or FEDSELECT_KEY.", rich_help_panel=PANEL),
]
Key = Annotated[
    str | None, typer.Option(envvar="FEDSELECT_KEY", hidden=True, callback=from_environment)
]
Project = Annotated[
    str | None,
    typer.Option(
        envvar="FEDSELECT_PROJECT",
        help="Id, for a key of a whole organisation.",
        rich_help_panel=PANEL,
    ),
]
File = Annotated[
    Path,
    typer.Option(
        "--profiles-file", envvar="FEDSELECT_PROFILES", help="The profiles.", rich_help_panel=PANEL
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@dataclass(frozen=True)
class Given:
    """The options of one call that say where to."""

    profile: str | None
    server: str | None
    key_file: Path | None
    key: str | None
    project: str | None
    profiles_file: Path
    server_typed: bool = False  # --server, not FEDSELECT_SERVER


OPTIONS: dict[str, tuple[Any, Any]] = {
    "profile": (Name, None),
    "server": (Server, None),
    "key_file": (KeyFile, None),
    "key": (Key, None),
    "project": (Project, None),
    "profiles_file": (File, PROFILES),
}


def command(
    place: typer.Typer,
    name: str,
    *,
    columns: Sequence[str] = (),
    rows: str | None = None,
    panel: str | None = None,
) -> Callable[[Work], Work]:
    """Make a command of ``work(client, …)``; ``columns`` are those of its table, if it is a list.

    A column ``a.b`` shows the field b of the field a. ``rows`` names the list of a document that
    its table shows; JSON is the whole document.
    """

    def decorate(work: Work) -> Work:
        def run(given: Given, as_json: bool, **options: Any) -> None:
            with connect(given) as client:
                show(work(client, **options), as_json=as_json, columns=columns, rows=rows)

        add(place, name, run, like=work, panel=panel)
        return work

    return decorate


def add(
    place: typer.Typer,
    name: str,
    run: Callable[..., None],
    *,
    like: Callable[..., Any],
    panel: str | None = None,
) -> None:
    """Make a command of ``run(given, as_json, …)``.

    Its help and its parameters are those of ``like``, whose first one is what ``run`` makes of
    ``given``; the options that say where to are added.
    """

    def call(context: typer.Context, as_json: bool, **options: Any) -> None:
        where = {name: options.pop(name) for name in OPTIONS}
        run(Given(**where, server_typed=typed(context, "server")), as_json, **options)

    own = list(inspect.signature(like, eval_str=True).parameters.values())[1:]
    kind = inspect.Parameter.KEYWORD_ONLY
    every = [
        inspect.Parameter("context", kind, annotation=typer.Context),
        *(p.replace(kind=kind) for p in own),
        *(
            inspect.Parameter(n, kind, annotation=annotation, default=default)
            for n, (annotation, default) in OPTIONS.items()
        ),
        inspect.Parameter("as_json", kind, annotation=AsJson, default=False),
    ]
    call.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]  # what typer reads
    call.__annotations__ = {p.name: p.annotation for p in every}
    call.__doc__, call.__name__ = like.__doc__, like.__name__
    place.command(name, rich_help_panel=panel)(call)


def group(text: str) -> typer.Typer:
    """A group of commands; without a command it shows its help."""
    return typer.Typer(no_args_is_help=True, help=text)


# --- what is sent ------------------------------------------------------------------------------


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def valid(form: type[Document], **values: Any) -> Document:
    """A document, or what is wrong with it.

    Raises:
        FedSelectError: request_invalid.
    """
    try:
        return form(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        text = f"{where}: {first['msg']}" if where else first["msg"]
        raise FedSelectError(text, code="request_invalid") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FedSelectError: file_invalid.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FedSelectError(f"{path} cannot be read: {error}", code="file_invalid") from error
    if not isinstance(found, dict):
        raise FedSelectError(f"{path} holds no JSON object", code="file_invalid")
    return found


# --- where to ----------------------------------------------------------------------------------


def connect(given: Given, *, retries: Retries | None = None) -> Client:
    """A client for what the options, the environment and the profiles say.

    A profile that is named beats the environment: its key goes to no other server, and no other key
    to its server. Without one the environment counts, then the default profile, then the local
    stack of this folder.

    Raises:
        FedSelectError: server_missing, key_missing, key_exposed, profile_unknown, profile_invalid.
    """
    profile = _profile(given)
    named = given.profile is not None
    server = given.server if given.server_typed or not named else None
    server = server or (profile.server if profile else None)
    if server is None:
        raise FedSelectError(
            "no server is named: give --profile or --server, or set FEDSELECT_SERVER",
            code="server_missing",
        )
    if given.key_file is not None:
        key = read_key(given.key_file)
    elif given.key and not named:
        key = given.key
    elif profile is not None and profile.key_file and server == profile.server:
        key = read_key(Path(profile.key_file).expanduser())
    else:
        raise FedSelectError(
            f"no key for {server}: give --key-file, or set FEDSELECT_KEY", code="key_missing"
        )
    project = given.project or (profile.project if profile else None)
    try:
        project = str(UUID(project)) if project else None
    except ValueError:
        raise FedSelectError("a project's id is a UUID", code="project_invalid") from None
    return Client(server, key=key, project=project, retries=retries)


def _profile(given: Given) -> Profile | None:
    if given.profile is None and given.server and given.key:
        return None
    known = read_profiles(given.profiles_file.expanduser())
    name = given.profile or known.default
    if name is not None:
        return known.named(name)
    local = read_profiles(LOCAL)
    return local.named(local.default) if local.default else None


# --- what it prints ----------------------------------------------------------------------------


def show(
    answer: Any, *, as_json: bool, columns: Sequence[str] = (), rows: str | None = None
) -> None:
    """Print a document, the list ``rows`` of it, or a list of documents."""
    if rows is not None and not as_json:
        answer = getattr(answer, rows)
    if isinstance(answer, BaseModel):
        document = answer.model_dump(mode="json")
        typer.echo(json.dumps(document)) if as_json else _console().print(_sheet(document))
        return
    items = [item.model_dump(mode="json") for item in answer]
    typer.echo(json.dumps(items)) if as_json else _console().print(_list(items, columns))


def _console() -> Console:
    return Console(emoji=False, highlight=False)


def _list(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(*(c.rpartition(".")[2].replace("_", " ") for c in columns), box=None)
    for row in rows:
        table.add_row(*(_cell(_field(row, column)) for column in columns))
    return table


def _sheet(document: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in document.items():
        table.add_row(name.replace("_", " "), _cell(value))
    return table


def _field(row: Any, path: str) -> Any:
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _cell(value: Any) -> str:
    """What others wrote must not steer a terminal."""
    if value is None:
        return "–"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ", ".join(value)
    elif isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return escape("".join(c if c.isprintable() else " " for c in str(value)))
