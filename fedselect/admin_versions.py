"""The ``fedselect admin versions`` commands: look at versions, compare them, take them along.

Owns the group and its commands; each is one call, or a download that is written to a file. Must not
print (``remote`` does) or contain rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from pydantic import BaseModel

from fedselect.client import Client
from fedselect.explaindocs import AblationCreate, AblationInfo, AblationsAsked
from fedselect.exporting import export_version
from fedselect.personal import write_atomically
from fedselect.protocol import VersionInfo
from fedselect.remote import command, group, valid
from fedselect.space import ParameterSpace
from fedselect.versiondocs import Lineage, SpaceDocument, VersionCard, VersionDifference

Id = Annotated[UUID, typer.Argument(metavar="ID")]
Out = Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="Where to.")]
versions = group("Versions of models.")


class Written(BaseModel):
    """A file that was written."""

    file: str
    bytes: int


def _write(path: Path, data: bytes) -> Written:
    write_atomically(path, data)
    return Written(file=str(path), bytes=len(data))


@command(versions, "show")
def show_version(client: Client, version_id: Id) -> VersionInfo:
    """Show one version."""
    return client.version(version_id)


@command(versions, "lineage")
def show_lineage(client: Client, version_id: Id) -> Lineage:
    """Show where a version comes from."""
    return client.lineage(version_id)


@command(versions, "diff")
def show_difference(
    client: Client,
    version_id: Id,
    base: Annotated[UUID | None, typer.Option(help="By default the parent.")] = None,
) -> VersionDifference:
    """Show how far each tensor moved."""
    return client.difference(version_id, base=base)


@command(versions, "card")
def show_card(client: Client, version_id: Id) -> VersionCard:
    """Show a version's model card."""
    return client.card(version_id)


@command(versions, "write-card")
def write_card(client: Client, version_id: Id, file: Out) -> Written:
    """Write a version's model card as Markdown."""
    return _write(file, client.card(version_id).markdown.encode())


@command(versions, "export")
def export(client: Client, version_id: Id, file: Out) -> Written:
    """Write a version as a plain PyTorch state_dict, in safetensors."""
    version = client.version(version_id)
    space = ParameterSpace.from_json(client.space(version.model_id).model_dump())
    data = client.fetch(client.download(version_id))
    return _write(file, export_version(data, space))


@command(versions, "space")
def show_space(
    client: Client, model_id: Annotated[UUID, typer.Argument(metavar="MODEL")]
) -> SpaceDocument:
    """Show a model's parameter space."""
    return client.space(model_id)


@command(versions, "ablate")
def ask_ablations(
    client: Client,
    version_id: Id,
    name: Annotated[
        list[str] | None,
        typer.Option("--client", metavar="NAME", help="Of a client; repeatable. Else all."),
    ] = None,
    deadline: Annotated[int, typer.Option(help="Seconds that they have.")] = 3600,
) -> AblationsAsked:
    """Ask clients what their personal parts of a version are worth; `runs explain` tells it."""
    asked = valid(AblationCreate, clients=name or None, deadline=deadline)
    return client.ask_ablations(version_id, asked)


@command(versions, "ablations", columns=("client_name", "attempt", "state", "deadline", "reason"))
def list_ablations(client: Client, version_id: Id) -> Iterator[AblationInfo]:
    """List who was asked for an ablation, and who has answered."""
    return client.ablations(version_id)
