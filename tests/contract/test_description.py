"""The description of the interface is complete, and what breaks a client is found.

That it is the one in the repository, ``test_docs`` says.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from app.main import MODULES

from .breaking import breaking
from .document import Json, generated, operations, plain, text

ERRORS = Path(__file__).parents[2] / "docs" / "ERRORS.md"
DOCUMENT = plain(generated())
OPERATIONS = dict(operations(DOCUMENT))


def test_a_text_says_what_the_document_says() -> None:
    assert json.loads(text(DOCUMENT)) == DOCUMENT


# --- every operation ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_described_in_full(name: str) -> None:
    operation = OPERATIONS[name]
    assert re.fullmatch(r"[a-z][a-zA-Z]+", operation["operationId"])
    assert operation["summary"]
    assert operation["description"].rstrip().endswith((".", "?"))
    assert operation["tags"]
    assert operation["security"] in ([], [{"key": []}])
    assert ("x-scope" in operation) == bool(operation["security"])
    assert [status for status in operation["responses"] if status < "300"]
    for body in (operation.get("requestBody"), *operation["responses"].values()):
        for form, media in (body or {}).get("content", {}).items():
            if form.startswith("text/"):
                assert media["schema"] == {"type": "string"}
                continue
            reference = media["schema"]["$ref"]
            assert media.get("examples") or reference.endswith("/Problem")


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "/v1/" in name])
def test_its_refusals_are_named(name: str) -> None:
    operation = OPERATIONS[name]
    answers = operation["responses"]
    wanted = {"422", "429", "503"} | ({"401", "403", "404"} if operation["security"] else set())
    assert wanted <= set(answers)
    for status, answer in answers.items():
        if status < "400":
            continue
        assert answer["x-codes"], f"{status} names no code: problems(codes=...)"
        assert len(set(answer["x-codes"])) == len(answer["x-codes"])
        for code in answer["x-codes"]:
            assert f"`{code}`" in answer["description"]
        assert set(answer["content"]) == {"application/problem+json"}
        assert ("Retry-After" in _headers(answer)) == (status in {"429", "503"})


def _headers(answer: Json) -> set[str]:
    return set(answer.get("headers", {}))


def test_the_codes_are_those_of_the_errors_page_with_the_same_status() -> None:
    told: dict[str, str] = {}
    for line in ERRORS.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and re.fullmatch(r"[\d, ]+", cells[2]):
            for code in re.findall(r"`([a-z_<>]+)`", cells[1]):
                told[code] = cells[2]
    for name, operation in OPERATIONS.items():
        for status, answer in operation["responses"].items():
            for code in answer.get("x-codes", []):
                family = re.sub(r"^(run|round|assignment|rollout)_[a-z_]+$", r"\1_<state>", code)
                assert status in told.get(code, told.get(family, "")), (name, status, code)


def test_what_creates_takes_an_idempotency_key_and_nothing_else_does() -> None:
    found = {r.operation_id: r for module in MODULES for r in module.router.routes}
    for name, operation in OPERATIONS.items():
        names = {p["name"] for p in operation.get("parameters", [])}
        creating = "call.create(" in inspect.getsource(found[operation["operationId"]].endpoint)
        assert ("Idempotency-Key" in names) == creating == ("201" in operation["responses"]), name


def test_lists_say_how_they_are_paged() -> None:
    lists = [o for o in OPERATIONS.values() if o["operationId"].startswith("list")]
    assert len(lists) >= 9
    for operation in lists:
        names = {p["name"] for p in operation["parameters"]}
        assert {"limit", "cursor"} <= names, operation["operationId"]


def test_links_lead_to_operations_that_take_what_they_give() -> None:
    by_id = {o["operationId"]: name for name, o in OPERATIONS.items()}
    found = 0
    for operation in OPERATIONS.values():
        for answer in operation["responses"].values():
            for link in answer.get("links", {}).values():
                found += 1
                for parameter in link["parameters"]:
                    assert f"{{{parameter}}}" in by_id[link["operationId"]]
    assert found > 50


def test_examples_are_what_they_are_examples_of() -> None:
    shapes = {shape.__name__: shape for shape in _shapes(BaseModel)}
    for name, example in DOCUMENT["components"]["examples"].items():
        values, page = [example["value"]], re.fullmatch(r"Page_(\w+)_", name)
        if page:
            values = example["value"]["items"]
            assert values
        for value in values:
            shapes[page[1] if page else name].model_validate(value)


def _shapes(shape: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for below in shape.__subclasses__():
        yield below
        yield from _shapes(below)


# --- what breaks whom --------------------------------------------------------------------------


def changed(*path: Any, to: Any) -> Json:
    """The document with one value changed, or removed (``to=None``)."""
    found: Json = copy.deepcopy(DOCUMENT)
    place: Any = found
    for step in path[:-1]:
        place = place[step]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return found


RUNS = ("paths", "/v1/runs")
SCHEMAS = ("components", "schemas")
REGISTRATION = (*SCHEMAS, "Registration")
BREAKING = {
    "GET /v1/runs: removed": changed(*RUNS, "get", to=None),
    "GET /v1/runs: operationId was listRuns, is runs": changed(
        *RUNS, "get", "operationId", to="runs"
    ),
    "POST /v1/clients: now needs a key": changed(
        "paths", "/v1/clients", "post", "security", to=[{"key": []}]
    ),
    "GET /v1/runs query limit: removed": changed(
        *RUNS, "get", "parameters", to=DOCUMENT["paths"]["/v1/runs"]["get"]["parameters"][1:]
    ),
    "POST /v1/runs 201: removed": changed(*RUNS, "post", "responses", "201", to=None),
    "POST /v1/runs 409: codes idempotency_in_flight, model_without_weights removed": changed(
        *RUNS, "post", "responses", "409", "x-codes", to=["run_name_taken"]
    ),
    "GET /v1/runs 200.items[].published: removed": changed(
        *SCHEMAS, "RunInfo", "properties", "published", to=None
    ),
    "GET /v1/runs 200.items[].published: may now be left out": changed(
        *(*SCHEMAS, "RunInfo", "required"),
        to=[
            n for n in DOCUMENT["components"]["schemas"]["RunInfo"]["required"] if n != "published"
        ],
    ),
    "GET /v1/runs 200.items[].published: now also string": changed(
        *SCHEMAS, "RunInfo", "properties", "published", to={"type": ["integer", "string"]}
    ),
    "POST /v1/clients body.tags: now required": changed(
        *REGISTRATION, "required", to=["token", "name", "tags"]
    ),
    "POST /v1/clients body.tags: maxItems was 20, is 10": changed(
        *REGISTRATION, "properties", "tags", "maxItems", to=10
    ),
    "POST /v1/clients body.tags: removed": changed(*REGISTRATION, "properties", "tags", to=None),
    "POST /v1/clients body.token: pattern was none, is ^fse": changed(
        *REGISTRATION, "properties", "token", "pattern", to="^fse"
    ),
    "POST /v1/clients body.token: no longer string": changed(
        *REGISTRATION, "properties", "token", "type", to="integer"
    ),
    "POST /v1/keys body.role: value owner no longer accepted": changed(
        *SCHEMAS, "KeyCreate", "properties", "role", "enum", to=["operator", "auditor", "viewer"]
    ),
}


@pytest.mark.parametrize("sentence", BREAKING)
def test_what_breaks_clients_is_named(sentence: str) -> None:
    found = breaking(DOCUMENT, BREAKING[sentence])
    assert any(each.startswith(sentence) for each in found), found


@pytest.mark.parametrize(
    "new",
    [
        changed("paths", "/v1/more", to=DOCUMENT["paths"]["/v1/runs"]),
        changed(*SCHEMAS, "RunInfo", "properties", "more", to={"type": "string"}),
        changed(*REGISTRATION, "properties", "more", to={"type": "string"}),
        changed(*REGISTRATION, "properties", "tags", "maxItems", to=30),
        changed(*RUNS, "post", "responses", "410", to={"description": "Gone."}),
        changed(*RUNS, "get", "summary", to="All runs"),
        changed(*REGISTRATION, "required", to=["token"]),
    ],
)
def test_additions_break_nobody(new: Json) -> None:
    assert breaking(DOCUMENT, new) == []
    assert breaking(DOCUMENT, DOCUMENT) == []
