"""docs/WIRE.md and docs/ROUND-CYCLE.md say what the code does."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from wire_samples import GOLDEN, MASK, SPACE

from fedselect import deflate, deltas, inspection, layout, lifecycle, wire
from fedselect.errors import MaskError, WireError
from fedselect.masks import BLOCK
from fedselect.protocol import GROUP, SHARD, Manifest, ManifestUpdate

MODULES = (wire, layout, inspection, deltas, deflate)
DOCS = Path(__file__).parents[2] / "docs"
WIRE = (DOCS / "WIRE.md").read_text()
CYCLE = (DOCS / "ROUND-CYCLE.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", WIRE, re.DOTALL | re.MULTILINE)


def test_the_worked_example_is_the_golden_file():
    rows = [row.split("  ") for block in fenced("hexdump") for row in block.splitlines()]
    data = b"".join(bytes.fromhex(row[1]) for row in rows)
    assert data == (GOLDEN / "update-first.safetensors").read_bytes()
    place = 0
    for offset, text, *_ in rows:
        assert int(offset, 16) == place
        place += len(bytes.fromhex(text))


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


@pytest.mark.parametrize("name", [*wire.UPDATE_FIELDS, "block_rank", "values", "mask"])
def test_every_field_and_section_is_documented(name):
    assert f"| `{name}` |" in WIRE


def test_the_numbers_are_the_real_ones():
    assert wire.UPDATE_FORMAT in WIRE
    assert wire.VERSION_FORMAT in WIRE
    assert f"{wire.HEADER_CAP:,} (256 KiB)" in WIRE
    assert f"{BLOCK:,}" in WIRE
    assert wire.MAX_EXAMPLES == 10**12
    assert GROUP == 8


def test_the_manifest_in_the_doc_is_one():
    (text,) = fenced("json")
    document = json.loads(text)
    manifest = Manifest.model_validate(document)
    assert manifest.model_dump(mode="json") == document
    assert list(document) == list(Manifest.model_fields)
    assert list(document["updates"][0]) == list(ManifestUpdate.model_fields)
    assert (manifest.group, manifest.shard) == (GROUP, SHARD)
    assert (manifest.space, manifest.elements) == (SPACE.digest, SPACE.dim)
    (update,) = manifest.updates
    golden = json.loads((GOLDEN / "update-first.json").read_text())
    assert (update.sha256, update.mask_sha256) == (golden["sha256"], MASK.digest)


@pytest.mark.parametrize("kind", ["Assignment", "Round", "Run"])
def test_every_state_and_event_is_in_the_life_of_a_round(kind):
    for enum in (getattr(lifecycle, f"{kind}State"), getattr(lifecycle, f"{kind}Event")):
        assert not [item for item in enum if f"`{item.value}`" not in CYCLE]
