"""docs/WIRE.md and docs/ROUND-CYCLE.md say what the code does."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from wire_samples import GOLDEN, MASK, SPACE

from fedselect import (
    checks,
    deflate,
    deltafiles,
    deltas,
    inspection,
    layout,
    lifecycle,
    maskcoding,
    wire,
)
from fedselect.downloads import LONGEST_CHAIN
from fedselect.errors import MaskError, WireError
from fedselect.manifestdocs import GROUP, SHARD, Manifest, ManifestUpdate
from fedselect.masks import BLOCK

MODULES = (wire, checks, layout, inspection, deltas, deltafiles, deflate, maskcoding)
DOCS = Path(__file__).parents[2] / "docs"
WIRE = (DOCS / "WIRE.md").read_text()
CYCLE = (DOCS / "ROUND-CYCLE.md").read_text()


CODED = WIRE.partition(f"`{wire.CODED_FORMAT}`\n")[2].partition("\n## ")[0]


def fenced(language: str, text: str = WIRE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [("update-first", WIRE.replace(CODED, ""), 0), ("coded-int8-first", CODED, 0x280)],
)
def test_the_worked_example_is_the_golden_file(name, text, first):
    rows = [row.split("  ") for block in fenced("hexdump", text) for row in block.splitlines()]
    data = b"".join(bytes.fromhex(row[1]) for row in rows)
    golden = (GOLDEN / f"{name}.safetensors").read_bytes()
    assert data == golden[first:]
    assert first in {0, wire.header_size(golden)}
    place = first
    for offset, row, *_ in rows:
        assert int(offset, 16) == place
        place += len(bytes.fromhex(row))


def codes_of_wire() -> set[str]:
    """Constants that look like codes: ``code=…``, and the table of what must match."""
    text = "\n".join(Path(m.__file__).read_text() for m in MODULES)
    tree = ast.parse(text.replace("from __future__ import annotations", ""))
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    named = {
        k.value.value
        for k in ast.walk(tree)
        if isinstance(k, ast.keyword) and k.arg == "code" and isinstance(k.value, ast.Constant)
    }
    listed = {w for w in words if isinstance(w, str) and w.endswith(("_mismatch", "_unknown"))}
    from_masks = {"mask_size", "mask_padding", MaskError.code, WireError.code}
    return named | listed | from_masks


def test_every_code_of_the_wire_is_documented_and_no_other():
    codes = codes_of_wire()
    assert len(codes) > 20
    table = WIRE.partition("| code | what is wrong |")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {code for cell in cells for code in re.findall(r"`(\w+)`", cell)} == codes


FIELDS = [*wire.UPDATE_FIELDS, *layout.STEP_FIELDS, "block_rank", "lengths", "values", "mask"]


@pytest.mark.parametrize("name", sorted(set(FIELDS)))
def test_every_field_and_section_is_documented(name):
    assert f"| `{name}` |" in WIRE


def test_the_numbers_are_the_real_ones():
    assert wire.UPDATE_FORMAT in WIRE
    assert f"{deltas.SCALE_BLOCK:,} elements of the flat vector" in WIRE
    assert f"Every {maskcoding.CHUNK:,} elements are a chunk" in WIRE
    assert wire.VERSION_FORMAT in WIRE
    assert layout.STEP_FORMAT in WIRE
    assert f"at most {LONGEST_CHAIN} delta files" in WIRE
    assert f"{wire.HEADER_CAP:,} (256 KiB)" in WIRE
    assert f"{BLOCK:,}" in WIRE
    assert wire.MAX_EXAMPLES == 10**12
    assert GROUP == 8


def test_the_manifest_in_the_doc_is_one():
    (text,) = fenced("json")
    document = json.loads(text)
    manifest = Manifest.model_validate(document)
    assert manifest.model_dump(mode="json") == document
    of_some = {"encoding", "noise", "bounds", "norm"}  # of runs that ask for them
    assert list(document) == [name for name in Manifest.model_fields if name not in of_some]
    fields = [name for name in ManifestUpdate.model_fields if name not in of_some]
    assert list(document["updates"][0]) == fields
    assert (manifest.group, manifest.shard) == (GROUP, SHARD)
    assert (manifest.space, manifest.elements) == (SPACE.digest, SPACE.dim)
    (update,) = manifest.updates
    golden = json.loads((GOLDEN / "update-first.json").read_text())
    assert (update.sha256, update.mask_sha256) == (golden["sha256"], MASK.digest)


@pytest.mark.parametrize("kind", ["Assignment", "Round", "Run"])
def test_every_state_and_event_is_in_the_life_of_a_round(kind):
    for enum in (getattr(lifecycle, f"{kind}State"), getattr(lifecycle, f"{kind}Event")):
        assert not [item for item in enum if f"`{item.value}`" not in CYCLE]
