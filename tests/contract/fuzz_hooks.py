"""What the schema fuzzer is told beyond the schema; it loads this in a process of its own.

Half of the ids in addresses are those of things that exist, so that more than "not found" is
reached. Nobody ends the key that they ask with. Every answer is noted, and every refusal's code
must be one that the description names.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import schemathesis

from contract.document import generated, plain

WORLD: dict[str, Any] = json.loads(os.environ["FUZZ_WORLD"])
NOTES = Path(os.environ["FUZZ_NOTES"])
DOCUMENT = plain(generated())
CHANCE = random.Random(int(os.environ["FUZZ_SEED"]))
NOWHERE = "00000000-0000-4000-8000-000000000000"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    for name, value in WORLD["subjects"].items():
        if name in (case.path_parameters or {}) and CHANCE.random() < 0.5:
            case.path_parameters[name] = value
    if CHANCE.random() < 0.95:  # a project that is not there answers for everything behind it
        case.headers.pop("FedSelect-Project", None)
    operation = case.operation.definition.raw.get("operationId")
    if operation in {"revokeKey", "rotateKey"}:
        # Nor its successor, whose own successor would be the third: then the first one ends.
        case.path_parameters["key_id"] = CHANCE.choice([WORLD["subjects"]["key_id"], NOWHERE])
    if operation == "rotateOwnKey" and isinstance(case.body, dict):
        case.body.pop("grace", None)  # a day, if nothing is said


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    operation = case.operation.definition.raw.get("operationId", case.operation.label)
    code = response.json().get("code", "") if response.status_code >= 400 else ""
    with NOTES.open("a") as notes:
        notes.write(f"{operation} {response.status_code} {code}\n")


@schemathesis.check
def code_conformance(ctx: Any, response: Any, case: Any) -> None:
    """A refusal is a problem document with a code that the operation lists for this status."""
    if response.status_code < 400 or case.method.upper() != case.operation.method.upper():
        return
    answers = DOCUMENT["paths"][case.operation.path][case.operation.method.lower()]["responses"]
    listed = answers.get(str(response.status_code), {}).get("x-codes", [])
    code = response.json().get("code")
    if code not in {*listed, "route_unknown", "method_not_allowed", "body_too_large"}:
        raise AssertionError(f"{response.status_code} {code} is not among {listed}")
