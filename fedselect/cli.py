"""The ``fedselect`` command: it looks into files and ledgers itself and hands on everything else.

Owns the commands ``wire`` and ``audit`` (``admin`` is ``fedselect.admin``), the loading of the
halves that register themselves in the entry-point group ``fedselect.commands``, and how errors
look. Must not know training or the server: a half that is not installed costs nothing but a hint.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fedselect
from fedselect import audit, wire
from fedselect.deltas import Frames, Ranks, delta_encoding, dense_rank
from fedselect.errors import FedSelectError, WireError
from fedselect.halves import HALVES, Half
from fedselect.keyoption import from_environment
from fedselect.layout import read_step_layout
from fedselect.maskcoding import decode_mask
from fedselect.masks import BLOCK, Mask, packed_size

GROUP = "fedselect.commands"
FINITE_BLOCK = 1 << 20  # values checked at a time
Bytes = npt.NDArray[np.uint8]
OWN_PACKAGES = {"fedselect", "app", "workers"}

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


# --- dispatch ----------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; a deliberate error becomes one line on stderr and exit code 1."""
    word = next((w for w in sys.argv[1:] if w == "--version" or not w.startswith("-")), None)
    try:
        _run(word)
    except FedSelectError as error:
        typer.echo(f"error[{error.code}]: {_printable(str(error))}", err=True)
        sys.exit(1)


def _run(word: str | None) -> None:
    try:
        build(word)()
    except ModuleNotFoundError as error:
        # A half may load its heavy libraries only when a command runs. Ours missing is a bug.
        owner = _owner(word)
        if owner is None or str(error.name).partition(".")[0] in OWN_PACKAGES:
            raise
        raise _missing(word, HALVES[owner], error) from error


def build(word: str | None = None) -> typer.Typer:
    """The application with what ``word``, the command asked for, needs; None loads every half."""
    app = typer.Typer(
        name="fedselect",
        help="Personalized federated learning with automatically selected personal parameters.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.add_typer(wire_app, name="wire")
    app.add_typer(audit_app, name="audit")
    if word in {"wire", "audit", "--version"}:
        return app
    from fedselect import admin, pilot_cli  # with the HTTP client, which files do not need

    app.add_typer(admin.app, name="admin")
    app.add_typer(pilot_cli.app, name="pilot")
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if _owner(word) in {None, point.name}:
            _load(app, point)
    return app


def _owner(word: str | None) -> str | None:
    named = (name for name, half in HALVES.items() if word in {*half.commands, *half.joins})
    return next(named, None)


def _load(app: typer.Typer, point: EntryPoint) -> None:
    try:
        register = point.load()
    except ImportError as error:
        half = HALVES.get(point.name, Half("", {point.name: "Commands of another package."}))
        _stand_in(app, half, error)
    else:
        register(app)


def _stand_in(app: typer.Typer, half: Half, error: ImportError) -> None:
    """Commands that tell how to get the real ones."""

    def refuse(context: typer.Context) -> None:
        raise _missing(context.info_name, half, error)

    for command, text in half.commands.items():
        app.command(
            command,
            help=text,
            rich_help_panel=escape(f"Not installed: {half.cure}"),
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(refuse)


def _missing(command: str | None, half: Half, error: ImportError) -> FedSelectError:
    return FedSelectError(
        f"'{command}' cannot be loaded ({error}); to get it: {half.cure}", code="extra_missing"
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedselect {fedselect.__version__}")
        raise typer.Exit


def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _printable(text: str) -> str:
    """One line without control characters: a file's own words must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _show(facts: dict[str, str], *, title: str) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, _printable(value))
    Console(markup=False, emoji=False, highlight=False).print(table)


# --- wire --------------------------------------------------------------------------------------

wire_app = typer.Typer(help="Look into update, version and delta files.", no_args_is_help=True)


@wire_app.callback()
def _wire() -> None:
    pass


@wire_app.command("inspect")
def wire_inspect(file: File, as_json: AsJson = False) -> None:
    """Show what an update, version or delta file holds, and check what can be without a run.

    Exit code 1 and an error code if the file is not valid (docs/WIRE.md).
    """
    facts = inspect_file(file)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    shown = {name: str(value) for name, value in facts["metadata"].items()}
    for name, section in facts["sections"].items():
        shown[f"[{name}]"] = f"{section['count']:,} at bytes {section['start']}–{section['stop']}"
    shown |= {"bytes": f"{facts['size']:,}", "sha256": facts["sha256"]}
    if "personal_share" in facts:
        shown["personal"] = _personal_text(facts)
    _show(shown, title=f"{facts['format']}: {_printable(file.name)}")


def _personal_text(facts: dict[str, Any]) -> str:
    if facts["personal_share"] is None:
        return "unknown: the mask was left out, as it has not changed"
    share = 100 * facts["personal_share"]
    return f"{share:.2f} % ({facts['personal']:,} of {facts['elements']:,} elements)"


def inspect_file(path: Path) -> dict[str, Any]:
    """What an update or version file says, as plain JSON; memory does not grow with the file.

    Raises:
        WireError: not a valid file (docs/WIRE.md).
        MaskError: padding bits of its mask are set.
    """
    with path.open("rb") as file:
        first = file.read(8)
        layout = _any_layout(first + file.read(wire.header_size(first) - 8))
        wire.check_size(layout, path.stat().st_size)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    data: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
    if "lengths" in layout.sections:
        mask = _inspect_deltas(data, layout)
    else:
        values = _section(data, layout, "values").view("<f4")
        for start in range(0, values.size, FINITE_BLOCK):
            wire.check_finite(values[start : start + FINITE_BLOCK])
        mask = _inspect_mask(data, layout)
    return {
        "format": layout.metadata["format"],
        "metadata": dict(layout.metadata),
        "sections": {
            name: {"start": section.start, "stop": section.stop, "count": section.count}
            for name, section in layout.sections.items()
        },
        "size": layout.size,
        "sha256": digest,
        **mask,
    }


def _any_layout(head: bytes) -> wire.Layout:
    for read in (wire.read_update_layout, read_step_layout):
        try:
            return read(head)
        except WireError as error:
            if error.code != "format_unknown":
                raise
    return wire.read_version_layout(head)


def _section(data: Bytes, layout: wire.Layout, name: str) -> Bytes:
    section = layout.sections[name]
    return data[section.start : section.stop]


def _inspect_mask(data: Bytes, layout: wire.Layout) -> dict[str, Any]:
    shared = layout.sections["values"].count
    if "block_rank" not in layout.sections:
        return {"elements": shared}
    unknown = {"elements": None, "shared": shared, "personal": None, "personal_share": None}
    ranks = _section(data, layout, "block_rank")
    if "mask" not in layout.sections:
        if not ranks.size or int(ranks.view("<u8")[-1]) != shared:
            raise WireError("block_rank does not end with all values", code="block_rank_invalid")
        return unknown
    packed = _section(data, layout, "mask")
    personal = int(np.bitwise_count(packed).sum(dtype=np.int64))
    elements = shared + personal
    if packed_size(elements) != packed.size:
        raise WireError(
            f"a mask of {packed.size} bytes cannot cover {elements} elements", code="mask_size"
        )
    wire.check_block_rank(ranks.tobytes(), Mask(elements, packed))
    share = personal / elements if elements else 0.0
    return unknown | {"elements": elements, "personal": personal, "personal_share": share}


def _inspect_deltas(data: Bytes, layout: wire.Layout) -> dict[str, Any]:
    elements = wire.elements_of(layout)
    of_version = "block_rank" not in layout.sections
    ranks: Ranks = dense_rank(elements)
    if not of_version:
        ranks = _section(data, layout, "block_rank").view("<u8")
    lengths = _section(data, layout, "lengths").view("<u4")
    frames = Frames(delta_encoding(layout.metadata["encoding"]), elements, ranks, lengths)
    payload = _section(data, layout, "values")
    if frames.size != payload.size or int(ranks[0]):
        raise WireError("the tables do not fit the values", code="frames_invalid")
    for start in range(0, elements, BLOCK):
        stop = min(start + BLOCK, elements)
        first, last = frames.span(start, stop)
        frames.decode(payload[first:last].tobytes(), start, stop)
    if of_version:
        return {"elements": elements}
    if "mask" in layout.sections:
        _inspect_coded_mask(_section(data, layout, "mask").tobytes(), elements, ranks)
    shared = int(ranks[-1])
    share = (elements - shared) / elements if elements else 0.0
    return {
        "elements": elements,
        "shared": shared,
        "personal": elements - shared,
        "personal_share": share,
    }


def _inspect_coded_mask(sent: bytes, elements: int, ranks: Ranks) -> None:
    try:
        mask = decode_mask(elements, sent)
    except WireError as error:
        if error.code == "mask_missing":  # only those who hold the mask before it can tell
            return
        raise
    wire.check_block_rank(ranks.tobytes(), mask)


# --- audit -------------------------------------------------------------------------------------

audit_app = typer.Typer(
    help="Export the ledger, and verify an export offline.", no_args_is_help=True
)


@audit_app.callback()
def _audit() -> None:
    pass


@audit_app.command("export")
def audit_export(
    file: Annotated[Path, typer.Argument(dir_okay=False, writable=True)],
    server: Annotated[str, typer.Option(help="Address of the coordinator, https://host:port.")],
    key: Annotated[
        str, typer.Option(envvar="FEDSELECT_KEY", hidden=True, callback=from_environment)
    ],
    as_json: AsJson = False,
) -> None:
    """Write the ledger up to its newest head to a file, as JSON lines, for `audit verify`.

    Give an auditor's or owner's key in the variable FEDSELECT_KEY, which no process list shows.
    """
    from fedselect.client import Client
    from fedselect.ledgerdocs import export_lines

    draft = file.with_name(f".{file.name}.part")
    try:
        with (
            Client(server, key=key) as client,
            draft.open("w", encoding="utf-8", newline="") as out,
        ):
            head = client.checkpoint()
            for line in export_lines(client.ledger_entries(), head):
                out.write(line + "\n")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    size = audit.read_checkpoint(head.text).size
    facts = {"entries": size, "file": str(file)}
    typer.echo(json.dumps(facts) if as_json else f"{size:,} entries in {file}")


@audit_app.command("verify")
def audit_verify(
    export: File,
    public_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The verifier key you trust: name+hash+base64."),
    ] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="A head that was kept elsewhere; repeat."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Entries of other projects may be withheld.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that no entry of an exported ledger was edited, dropped, moved or cut off.

    Give the key that you noted when you joined (an agent keeps it in ledger-key.txt) and a head
    that you kept (an agent's checkpoint.txt): without them, an export only vouches for itself.
    """
    heads = [path.read_text("utf-8", errors="replace") for path in checkpoint or []]
    # Bytes that are not UTF-8 become surrogates, which the ledger refuses with the entry's number.
    with export.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        report = audit.verify_export(
            lines, public_key=public_key and public_key.strip(), heads=heads, partial=partial
        )
    _tell(report, as_json=as_json)


def _tell(report: audit.ExportReport, *, as_json: bool) -> None:
    """What an export that verifies says, and what it does not."""
    facts = {
        "entries": report.entries,
        "withheld": report.withheld,
        "heads": report.heads,
        "origin": report.checkpoint.origin,
        "root": report.checkpoint.root.hex(),
        "public_key": report.public_key,
        "pinned": report.pinned,
    }
    if as_json:
        typer.echo(json.dumps({"valid": True, **facts}))
        return
    shown = {name: str(value) for name, value in facts.items() if name != "pinned"}
    _show(shown, title=f"valid: {report.entries:,} entries, nothing changed")
    if not report.pinned:
        typer.echo(
            "note: this key comes from the export itself; pass the one you trust as --public-key"
        )
    if not report.heads:
        typer.echo(
            "note: a ledger that was rewritten and signed anew looks the same; pass a head that "
            "somebody kept as --checkpoint"
        )
