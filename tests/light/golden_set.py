"""The golden set of the wire as data: ``tests/golden/manifest.json``, for codecs in any language.

``python tests/light/golden_set.py`` writes it. What it says is checked by ``test_golden_set``,
which reads nothing but the manifest and the files that it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from wire_samples import GOLDEN, LOWER, SPACE, UPPER, take_apart

from fedselect.maskcoding import encode_mask
from fedselect.masks import Mask

Json = dict[str, Any]
MANIFEST = GOLDEN.parent / "manifest.json"
F32, INT8 = "update-first", "coded-int8-first"
OTHER = "cd" * 32


def edit(at: int, remove: int, insert: str = "") -> Json:
    """Bytes ``[at, at + remove)`` are replaced by those that ``insert`` has in hex."""
    return {"at": at, "remove": remove, "insert": insert}


# (file, what is wrong, edits, what was expected otherwise than the file says, code)
REFUSED: list[tuple[str, str, list[Json], Json, str]] = [
    (F32, "the last byte is missing", [edit(630, 1)], {}, "file_truncated"),
    (F32, "one byte too many", [edit(631, 0, "00")], {}, "file_trailing"),
    (
        F32,
        "a header beyond 256 KiB",
        [edit(0, 8, "0100040000000000")],
        {},
        "header_oversize",
    ),
    (F32, "padded with a tab", [edit(0x22F, 1, "09")], {}, "header_invalid"),
    (F32, "not JSON", [edit(8, 1, "5b")], {}, "header_invalid"),
    (F32, "a bit behind the last element", [edit(0x276, 1, "82")], {}, "mask_padding"),
    (F32, "one value less than shared", [edit(0x274, 1, "10")], {}, "values_length"),
    (F32, "a running mean is shared", [edit(0x274, 2, "1306")], {}, "mask_not_allowed"),
    (F32, "a rank too small", [edit(0x238, 1, "0c")], {}, "block_rank_invalid"),
    (F32, "NaN", [edit(0x240, 4, "0000c07f")], {}, "values_not_finite"),
    (F32, "infinity", [edit(0x240, 4, "0000807f")], {}, "values_not_finite"),
    (F32, "another model", [], {"space": OTHER}, "space_mismatch"),
    (F32, "another run", [], {"run": "another"}, "run_mismatch"),
    (F32, "another round", [], {"round": 4}, "round_mismatch"),
    (F32, "another assignment", [], {"assignment": "another"}, "assignment_mismatch"),
    (F32, "another base", [], {"base_version": OTHER}, "base_version_mismatch"),
    (F32, "the mask was counted before", [], {"mask_version": 2}, "mask_version_mismatch"),
    (F32, "the run exchanges deltas", [], {"encoding": "int8"}, "encoding_unknown"),
    (F32, "a value above the limit", [], {"max_abs": 1}, "value_too_large"),
    (F32, "a norm above the limit", [], {"max_norm": 1}, "norm_too_large"),
    (INT8, "the last byte is missing", [edit(684, 1)], {}, "file_truncated"),
    (INT8, "the run exchanges bf16", [], {"encoding": "bf16"}, "encoding_unknown"),
    (INT8, "the code -128", [edit(0x2A0, 1, "80")], {}, "code_invalid"),
    (INT8, "a negative scale", [edit(0x29F, 1, "bd")], {}, "code_invalid"),
    (INT8, "a scale that is NaN", [edit(0x29C, 4, "0000c07f")], {}, "values_not_finite"),
    (INT8, "a plane longer than its codes", [edit(0x290, 1, "0e")], {}, "frames_invalid"),
    (INT8, "a kind of mask that is none", [edit(0x294, 1, "08")], {}, "mask_coding_invalid"),
    (INT8, "a difference to no mask", [edit(0x294, 1, "04")], {}, "mask_missing"),
]


def masks() -> Iterator[Json]:
    """One coded mask of every kind."""
    rng = np.random.default_rng(1)
    even = Mask.from_bool(rng.random(1000) < 0.5)
    rows = Mask.from_bool(np.resize([1, 1, 0, 1, 0, 0, 1, 0], 1000).astype(bool))
    few, most = (Mask.from_bool(rng.random(1000) < share) for share in (0.02, 0.98))
    for kind, bits in enumerate((even, rows, few, most)):
        yield _coded(kind, bits, None)
    for kind, bits in enumerate((even, rows, few, most)):
        # What is known is noise, so that only the difference is short.
        known = Mask.from_bool(rng.random(1000) < 0.5)
        yield _coded(kind + 4, known ^ bits, known)


def _coded(kind: int, mask: Mask, known: Mask | None) -> Json:
    coded = encode_mask(mask, known)
    if kind == 4:  # never the shortest, but to be understood
        body = (mask ^ known).to_bytes() if known else b""
        coded = bytes([kind]) + len(body).to_bytes(4, "little") + body
    assert coded[0] == kind, (kind, coded[0])
    return {
        "kind": kind,
        "elements": mask.dim,
        "known": known.to_bytes().hex() if known else None,
        "coded": coded.hex(),
        "packed": mask.to_bytes().hex(),
    }


def header_of(path: Path) -> Json:
    header: Json = take_apart(path.read_bytes())[0]
    return header


def build() -> Json:
    """The manifest."""
    files = []
    for path in sorted(GOLDEN.glob("*.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        form = header_of(path)["__metadata__"]["format"]
        # DEFLATE may differ from one library to another, so those files need not be the same.
        exact = form in {"fedselect-update/1", "fedselect-version/1"}
        entry = {"file": f"wire/{path.name}", "contents": f"wire/{path.stem}.json"}
        files.append(entry | {"format": form, "sha256": digest, "exact": exact})
    names = ("file", "about", "edits", "expects", "code")
    refused = [dict(zip(names, case, strict=True)) for case in REFUSED]
    return {
        "format": "fedselect-golden/1",
        "space": {"digest": SPACE.digest, **SPACE.to_json()},
        "bounds": {"lower": LOWER.to_bytes().hex(), "upper": UPPER.to_bytes().hex()},
        "files": files,
        "refused": [case | {"file": f"wire/{case['file']}.safetensors"} for case in refused],
        "masks": list(masks()),
    }


def text(manifest: Json) -> str:
    """A line for each case."""
    parts = []
    for name, value in manifest.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f' "{name}": [\n{rows}\n ]')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    Path(MANIFEST).write_text(text(build()))
