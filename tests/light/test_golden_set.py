"""The golden set says the truth: read as an implementer in another language would read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_set import MANIFEST, build, text

from fedselect import wire
from fedselect.errors import WireError
from fedselect.maskcoding import decode_mask
from fedselect.masks import Mask

SET = json.loads(MANIFEST.read_text())
FOLDER = MANIFEST.parent


def test_the_manifest_is_the_newest() -> None:
    assert MANIFEST.read_text() == text(build()), "renew it: python tests/light/golden_set.py"


def test_every_golden_file_is_in_it() -> None:
    listed = {FOLDER / case[part] for case in SET["files"] for part in ("file", "contents")}
    assert listed == set((FOLDER / "wire").iterdir())
    page = (FOLDER / "README.md").read_text()
    for case in SET["files"]:
        assert f"`{Path(case['file']).stem}`" in page
        data = (FOLDER / case["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == case["sha256"]
        assert json.loads((FOLDER / case["contents"]).read_text())["sha256"] == case["sha256"]


def packed(elements: int, bits: str) -> Mask:
    return Mask.from_bytes(elements, bytes.fromhex(bits))


def plan_of(case: dict[str, Any]) -> wire.UpdatePlan:
    """What a coordinator expects: what the file says of itself, but for what the case changes."""
    contents = json.loads((FOLDER / case["file"]).with_suffix(".json").read_text())
    meta = contents["metadata"] | {"max_abs": np.inf, "max_norm": np.inf} | case["expects"]
    del meta["examples"]
    version = meta.pop("mask_version") - 1
    bounds = {name: packed(contents["elements"], bits) for name, bits in SET["bounds"].items()}
    return wire.UpdatePlan(**bounds, known_mask_version=version, **meta)


@pytest.mark.parametrize("case", SET["refused"], ids=lambda case: case["about"])
def test_what_must_be_refused(case: dict[str, Any]) -> None:
    data = (FOLDER / case["file"]).read_bytes()
    for edit in case["edits"]:
        end = edit["at"] + edit["remove"]
        data = data[: edit["at"]] + bytes.fromhex(edit["insert"]) + data[end:]
    with pytest.raises(WireError) as caught:
        wire.decode_update(data, plan_of(case))
    assert caught.value.code == case["code"]


@pytest.mark.parametrize("name", sorted({case["file"] for case in SET["refused"]}))
def test_unchanged_they_are_welcome(name: str) -> None:
    wire.decode_update((FOLDER / name).read_bytes(), plan_of({"file": name, "expects": {}}))


@pytest.mark.parametrize("case", SET["masks"], ids=lambda case: f"kind {case['kind']}")
def test_coded_masks(case: dict[str, Any]) -> None:
    known = packed(case["elements"], case["known"]) if case["known"] else None
    found = decode_mask(case["elements"], bytes.fromhex(case["coded"]), known)
    assert found == packed(case["elements"], case["packed"])
    assert case["coded"].startswith(f"0{case['kind']}")


def test_every_kind_of_mask_is_there() -> None:
    assert [case["kind"] for case in SET["masks"]] == list(range(8))
