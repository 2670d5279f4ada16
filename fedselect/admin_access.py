"""The ``fedselect admin`` commands about who may do what: profiles, projects, clients, keys,
members.

Owns their names and arguments; each is one call. Must not print (``remote`` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from pydantic import BaseModel

from fedselect.client import Client
from fedselect.personal import write_atomically
from fedselect.profiles import Profile, Profiles, read_profiles, write_profiles
from fedselect.protocol import ClientConduct, ClientInfo, Enrolments
from fedselect.remote import PROFILES, AsJson, File, command, given, group, show, valid
from fedselect.retention import Erasure
from fedselect.tenancy import (
    DAY,
    ClientChange,
    KeyCreate,
    KeyInfo,
    KeyIssued,
    KeyRotate,
    MemberCreate,
    MemberInfo,
    ProjectChange,
    ProjectCreate,
    ProjectInfo,
)

profiles = group("Coordinators and keys by name, in profiles.toml.")
projects = group("Projects of the organisation.")
clients = group("Sites and devices that take part.")
keys = group("Keys of people and programs.")
members = group("People who sign in with the identity provider.")


def _new_file(path: Path | None) -> Path | None:
    if path is not None and path.exists():
        raise typer.BadParameter(f"{path} is there already; name a new file")
    return path


Id = Annotated[UUID, typer.Argument(metavar="ID")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The middle of the key's text.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", callback=_new_file, help="Write the key to this new file, mode 600."),
]
Grace = Annotated[int, typer.Option(help="Seconds that the old key still works.")]
Title = Annotated[str, typer.Option("--name", help="What it is for.")]
Scopes = Annotated[list[str] | None, typer.Option("--scope", help="Only this one; repeat.")]
Until = Annotated[int | None, typer.Option("--expires-in", help="Seconds until it ends.")]
Bound = Annotated[
    str | None,
    typer.Option("--certificate", help="Works with this client certificate alone: SHA-256, hex."),
]
NewName = Annotated[str | None, typer.Option("--name", help="The new name.")]


# --- profiles ----------------------------------------------------------------------------------


class ProfileLine(BaseModel):
    """A profile as it is listed."""

    name: str
    default: bool
    server: str
    key_file: str | None
    project: str | None


@profiles.command("list")
def list_profiles(profiles_file: File = PROFILES, as_json: AsJson = False) -> None:
    """List the profiles; never a key."""
    known = read_profiles(profiles_file.expanduser())
    rows = [
        ProfileLine(name=name, default=name == known.default, **vars(profile))
        for name, profile in known.profiles.items()
    ]
    show(rows, as_json=as_json, columns=("name", "default", "server", "project", "key_file"))


@profiles.command("set")
def set_profile(
    name: str,
    server: Annotated[str, typer.Option(help="https://host:port")],
    key_file: Annotated[Path, typer.Option(help="File with the key, mode 600.")],
    project: Annotated[str | None, typer.Option(help="For a key of an organisation.")] = None,
    default: Annotated[bool, typer.Option("--default", help="Use it where none is named.")] = False,
    profiles_file: File = PROFILES,
) -> None:
    """Add a profile, or change it."""
    file = profiles_file.expanduser()
    known = read_profiles(file)
    key = str(key_file.expanduser().absolute())
    changed = known.profiles | {name: Profile(server, key, project)}
    write_profiles(file, Profiles(name if default else known.default, changed))


@profiles.command("remove")
def remove_profile(name: str, profiles_file: File = PROFILES) -> None:
    """Remove a profile; its key file stays."""
    file = profiles_file.expanduser()
    known = read_profiles(file)
    known.named(name)
    left = {n: p for n, p in known.profiles.items() if n != name}
    write_profiles(file, Profiles(None if known.default == name else known.default, left))


# --- projects ----------------------------------------------------------------------------------


@command(projects, "list", columns=("id", "organisation", "name", "clients", "client_limit"))
def list_projects(client: Client) -> Iterator[ProjectInfo]:
    """List projects, oldest first."""
    return client.projects()


@command(projects, "show")
def show_project(client: Client, project_id: Id) -> ProjectInfo:
    """Show one project."""
    return client.project(project_id)


@command(projects, "create")
def create_project(
    client: Client,
    name: str,
    client_limit: Annotated[int | None, typer.Option(help="Most clients.")] = None,
) -> ProjectInfo:
    """Create a project in the organisation of the key."""
    return client.create_project(valid(ProjectCreate, name=name, client_limit=client_limit))


@command(projects, "edit")
def edit_project(
    client: Client,
    project_id: Id,
    name: NewName = None,
    client_limit: Annotated[int | None, typer.Option(help="Most clients.")] = None,
    no_limit: Annotated[bool, typer.Option("--no-limit", help="Take the limit away.")] = False,
) -> ProjectInfo:
    """Rename a project, or limit its clients; what is not given stays."""
    change = given(name=name, client_limit=client_limit)
    if no_limit:
        change["client_limit"] = None
    return client.edit_project(project_id, valid(ProjectChange, **change))


# --- clients -----------------------------------------------------------------------------------


@command(clients, "list", columns=("id", "name", "state", "tags", "last_seen_at"))
def list_clients(client: Client) -> Iterator[ClientInfo]:
    """List clients, oldest first."""
    return client.clients()


@command(clients, "show")
def show_client(client: Client, client_id: Id) -> ClientInfo:
    """Show one client."""
    return client.client(client_id)


@command(clients, "conduct", rows="runs", columns=("run_id", "run", "count", "limit", "window"))
def show_conduct(client: Client, client_id: Id) -> ClientConduct:
    """Show how many strikes count against a client, and how many suspend it; --json says why."""
    return client.client_conduct(client_id)


@command(clients, "enrol")
def enrol(
    client: Client,
    count: Annotated[int, typer.Option(help="How many tokens.")] = 1,
    expires_in: Annotated[int, typer.Option(help="Seconds until they end.")] = 3600,
) -> Enrolments:
    """Make single-use enrolment tokens; each is shown this one time and admits one client."""
    return client.create_enrolments(count, expires_in)


@command(clients, "edit")
def edit_client(
    client: Client,
    client_id: Id,
    name: NewName = None,
    tag: Annotated[list[str] | None, typer.Option(help="All its tags; repeat.")] = None,
    no_tags: Annotated[bool, typer.Option("--no-tags", help="Take all tags away.")] = False,
) -> ClientInfo:
    """Give a client another name or other tags; what is not given stays."""
    change = given(name=name, tags=[] if no_tags else tag or None)
    return client.edit_client(client_id, valid(ClientChange, **change))


@command(clients, "suspend")
def suspend_client(client: Client, client_id: Id) -> ClientInfo:
    """Keep a client out until it is activated again."""
    return client.suspend_client(client_id)


@command(clients, "activate")
def activate_client(client: Client, client_id: Id) -> ClientInfo:
    """Let a suspended client in again; what it was suspended for is forgiven."""
    return client.activate_client(client_id)


@command(clients, "revoke")
def revoke_client(client: Client, client_id: Id) -> ClientInfo:
    """Shut a client out for good; its keys end."""
    return client.revoke_client(client_id)


@command(clients, "erase")
def erase_client(
    client: Client,
    client_id: Id,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> Erasure:
    """Revoke a client and delete all that it has sent, for good."""
    if not yes:
        typer.confirm(f"Delete all that client {client_id} has sent, for good?", abort=True)
    return client.erase_client(client_id)


# --- keys --------------------------------------------------------------------------------------


@command(keys, "list", columns=("id", "name", "role", "last_used_at", "expires_at", "revoked_at"))
def list_keys(client: Client) -> Iterator[KeyInfo]:
    """List keys, oldest first, ended ones included; never a secret."""
    return client.keys()


@command(keys, "show")
def show_key(client: Client, key_id: KeyId) -> KeyInfo:
    """Show one key, without its secret."""
    return client.key(key_id)


@command(keys, "create")
def create_key(
    client: Client,
    role: Annotated[str, typer.Option(help="owner, operator, auditor or viewer")],
    name: Title = "",
    scope: Scopes = None,
    expires_in: Until = None,
    certificate: Bound = None,
    organisation: Annotated[
        bool, typer.Option("--organisation", help="For all its projects; with such a key only.")
    ] = False,
    out: Out = None,
) -> KeyIssued | KeyInfo:
    """Issue a key of the project; it is shown this one time, or written to a file."""
    rights = given(scopes=scope or None, certificate=certificate, expires_in=expires_in)
    wanted = valid(KeyCreate, role=role, name=name, organisation=organisation, **rights)
    return _kept(client.create_key(wanted), out)


@command(keys, "create-for-organisation")
def create_organisation_key(
    client: Client,
    role: Annotated[str, typer.Option(help="owner, operator, auditor or viewer")],
    name: Title = "",
    expires_in: Until = None,
    out: Out = None,
) -> KeyIssued | KeyInfo:
    """The same as `create --organisation`."""
    wanted = given(role=role, name=name, expires_in=expires_in, organisation=True)
    return _kept(client.create_key(valid(KeyCreate, **wanted)), out)


@command(keys, "rotate")
def rotate_key(
    client: Client, key_id: KeyId, grace: Grace = DAY, out: Out = None
) -> KeyIssued | KeyInfo:
    """Issue a key's successor; the old key works until the grace is over."""
    return _kept(client.rotate_key(key_id, valid(KeyRotate, grace=grace)), out)


@command(keys, "rotate-own")
def rotate_own_key(client: Client, grace: Grace = DAY, out: Out = None) -> KeyIssued | KeyInfo:
    """Issue a successor of the key in use."""
    return _kept(client.rotate_own_key(valid(KeyRotate, grace=grace)), out)


@command(keys, "revoke")
def revoke_key(client: Client, key_id: KeyId) -> KeyInfo:
    """End a key now."""
    return client.revoke_key(key_id)


def _kept(issued: KeyIssued, out: Path | None) -> KeyIssued | KeyInfo:
    if out is None:
        return issued
    write_atomically(out, f"{issued.key}\n".encode())
    return issued.info


# --- members -----------------------------------------------------------------------------------


@command(members, "list", columns=("id", "subject", "name", "role", "project_id", "ended_at"))
def list_members(client: Client) -> Iterator[MemberInfo]:
    """List memberships, oldest first, ended ones included."""
    return client.members()


@command(members, "add")
def add_member(
    client: Client,
    subject: Annotated[str, typer.Argument(help="The claim `sub` of their tokens.")],
    role: Annotated[str, typer.Option(help="owner, operator, auditor or viewer")],
    name: Annotated[str, typer.Option("--name", help="For people to read.")] = "",
    organisation: Annotated[
        bool, typer.Option("--organisation", help="In all projects; with such a key only.")
    ] = False,
) -> MemberInfo:
    """Let a person in who signs in with the identity provider."""
    wanted = {"subject": subject, "role": role, "name": name, "organisation": organisation}
    return client.add_member(valid(MemberCreate, **wanted))


@command(members, "end")
def end_member(client: Client, member_id: Id) -> MemberInfo:
    """End a membership now."""
    return client.end_member(member_id)
