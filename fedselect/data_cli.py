"""The commands ``data``: which data sets there are, fetching them, and saving splits of them.

Owns their options and what they print. Must not read or deal anything itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fedselect.errors import FedSelectError
from fedselect.tasks import task_arguments

if TYPE_CHECKING:
    from fedselect.tasks.splits import Manifest

app = typer.Typer(
    name="data", help="Fetch data sets, and deal them to clients.", no_args_is_help=True
)
SMALLEST_SIDE = 13  # the second convolution of the federations' network must fit into the picture
Cache = Annotated[
    Path | None, typer.Option(help="Folder of fetched data; by default ~/.cache/fedselect.")
]


def register(parent: typer.Typer) -> None:
    """Add the group."""
    parent.add_typer(app, name="data")


@app.command("list")
def list_datasets(cache: Cache = None) -> None:
    """Name the data sets that are known and those of your own, and say which are here."""
    from fedselect.tasks.datasets import names_in
    from fedselect.tasks.sources import SOURCES, open_dataset

    table = Table()
    for column in ("name", "what", "terms, and where it comes from", "here"):
        table.add_column(column)
    folder = _folder(cache)
    known = {name: (source.what, source.terms) for name, source in SOURCES.items()}
    own = dict.fromkeys(names_in(folder), ("data of your own", "yours"))
    for name, (what, terms) in {**own, **known}.items():
        try:
            here = f"{len(open_dataset(name, folder).labels):,} examples"
        except FedSelectError as error:
            here = "no" if error.code == "data_missing" else "damaged"
        table.add_row(name, what, terms, here)
    Console().print(table)


@app.command("get")
def get_dataset(
    name: Annotated[str, typer.Argument(help="One that `data list` names, or one to be made.")],
    place: Annotated[
        Path | None,
        typer.Option("--from", exists=True, help="A package, file or folder that is here already."),
    ] = None,
    images: Annotated[
        bool, typer.Option(help="--from is a folder of pictures, CLIENT/CLASS/ each.")
    ] = False,
    side: Annotated[
        int, typer.Option(min=SMALLEST_SIDE, max=512, help="Pixels of a picture's side.")
    ] = 32,
    cache: Cache = None,
) -> None:
    """Fetch a data set, check its files by SHA-256, and keep it as plain arrays."""
    from fedselect.tasks import sources
    from fedselect.tasks.datasets import save
    from fedselect.tasks.readers import image_folder

    if images:
        if place is None or name in sources.SOURCES:
            raise FedSelectError(
                "pictures need --from FOLDER, and a name of their own", code="data_unknown"
            )
        found = image_folder(name, place, side=side)
        save(found, _folder(cache))
    else:
        found = sources.get(name, given=place, cache=_folder(cache))
    typer.echo(f"{name}: {len(found.labels):,} examples of {found.classes} classes")
    typer.echo(f"digest {found.digest}")


@app.command("split")
def split_dataset(
    name: Annotated[
        str, typer.Argument(help="A data set that is here; or a federation, without settings.")
    ],
    out: Annotated[Path, typer.Option(help="The manifest is written to this file.")],
    setting: Annotated[
        list[str] | None,
        typer.Option(help="kind=classes, clients=20, classes=5, train=10, test=50; repeat."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows.")] = 0,
    cache: Cache = None,
) -> None:
    """Deal a data set to clients, and save who has which examples."""
    from fedselect.tasks.federations import FEDERATIONS, dealt
    from fedselect.tasks.sources import open_dataset
    from fedselect.tasks.splits import Split, deal

    if not setting and name in FEDERATIONS:
        _keep(dealt(name, seed, _folder(cache)), out)
        return
    try:
        split = Split.model_validate(task_arguments(setting or []))
    except ValidationError as error:
        texts = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise FedSelectError(texts, code="split_invalid") from error
    _keep(deal(open_dataset(name, _folder(cache)), split, seed=seed), out)


def _keep(manifest: Manifest, out: Path) -> None:
    manifest.save(out)
    typer.echo(f"{len(manifest.clients)} clients. Run it: fedselect simulate --task split:{out}")


@app.command("check")
def check_split(
    manifest: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], cache: Cache = None
) -> None:
    """Hold a saved split to its data: the same data set, and no row dealt twice."""
    from fedselect.tasks.sources import open_dataset
    from fedselect.tasks.splits import read_manifest

    found = read_manifest(manifest)
    found.verify(open_dataset(found.dataset, _folder(cache)))
    rows = [len(each.train) + len(each.test) for each in found.clients.values()]
    typer.echo(f"{found.dataset}: {len(rows)} clients, {sum(rows):,} examples, none dealt twice")


def _folder(cache: Path | None) -> Path:
    from fedselect.tasks.datasets import CACHE

    return CACHE if cache is None else cache
