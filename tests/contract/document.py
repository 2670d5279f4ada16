"""The description of the interface: as the repository keeps it, and as the code gives it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from app.main import interface

Json = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "openapi.json"


@cache
def generated() -> Json:
    """What the coordinator serves as ``/openapi.json``, as JSON gives it back."""
    document: Json = json.loads(json.dumps(interface().openapi()))
    return document


def kept() -> Json:
    document: Json = json.loads(PAGE.read_text())
    return document


def plain(document: Json) -> Json:
    """The document with shared refusals where they are referred to."""
    found: Json = copy.deepcopy(document)
    for item in found["paths"].values():
        for operation in item.values():
            for status, answer in operation["responses"].items():
                if "$ref" in answer:
                    name = answer["$ref"].rpartition("/")[2]
                    operation["responses"][status] = found["components"]["responses"][name]
    return found


def text(document: Json) -> str:
    """One document, one text; references and short lists stand on one line."""
    long = json.dumps(document, indent=1, ensure_ascii=False)
    long = re.sub(r'\{\s+("\$ref": "[^"]*")\s+\}', r"{\1}", long)
    return re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", _on_one_line, long) + "\n"


def _on_one_line(items: re.Match[str]) -> str:
    return "[" + re.sub(r",\n *", ", ", items[1]) + "]"


def operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield f"{method.upper()} {path}", operation
