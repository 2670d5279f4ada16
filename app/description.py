"""The description of the HTTP interface (OpenAPI), complete enough to build on.

Owns what is added to what FastAPI derives from the handlers: the codes of every refusal, examples,
headers, links from an answer to what can be asked next. Must not know what any route does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fastapi.routing import APIRoute

from app.auth import ROLES, Scope
from app.deprecation import HEADERS as DEPRECATION_HEADERS
from app.samples import sample
from fedselect.protocol import Problem

Json = dict[str, Any]
PROBLEM = {"$ref": "#/components/schemas/Problem"}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Chosen by the caller, new for each effect: asked again, the answer is the same "
    "and nothing is done twice.",
    "schema": {"type": "string", "maxLength": 255},
}
HEADERS: dict[str, Json] = {
    "X-Request-Id": {"description": "To quote.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds until it may pass.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "WWW-Authenticate": {"description": "How to ask.", "schema": {"type": "string"}},
    "ETag": {"description": "For `If-Match` of a change.", "schema": {"type": "string"}},
}
# What an answer of this schema names: the parameter of other operations, and where it is.
LEADS_TO = {
    "ClientInfo": ("client_id", "/id"),
    "Registered": ("client_id", "/client/id"),
    "ModelInfo": ("model_id", "/id"),
    "RunInfo": ("run_id", "/id"),
    "RoundInfo": ("round_id", "/id"),
    "RoundDetail": ("round_id", "/id"),
    "VersionInfo": ("version_id", "/id"),
    "JobInfo": ("job_id", "/id"),
    "UploadTicket": ("upload_id", "/id"),
    "ProjectInfo": ("project_id", "/id"),
    "KeyInfo": ("key_id", "/id"),
    "KeyIssued": ("key_id", "/info/id"),
    "WebhookInfo": ("webhook_id", "/id"),
    "WebhookIssued": ("webhook_id", "/webhook/id"),
    "DeliveryInfo": ("delivery_id", "/id"),
    "MemberInfo": ("member_id", "/id"),
    "CheckInAnswer": ("assignment_id", "/assignment/id"),
}


def complete(document: Json, routes: Iterable[APIRoute]) -> Json:
    """Add to FastAPI's ``document`` of these ``routes`` what it cannot know; returns it."""
    schemas = document["components"]["schemas"]
    problem = Problem.model_json_schema()
    schemas["Problem"] = problem | {"example": _problem_sample()}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["components"] |= {"examples": {}, "headers": HEADERS}
    scopes = {route.operation_id: _scope(route) for route in routes}
    operations = [
        (path, each) for path, item in document["paths"].items() for each in item.values()
    ]
    for path, operation in operations:
        scope = scopes[operation["operationId"]]
        for parameter in _parameters(operation):
            _simplify(parameter)
        _add_access(operation, scope)
        _add_problems(operation, scope, path)
        _add_examples(operation, schemas, document["components"]["examples"])
        _add_headers(operation, tagged=_tagged(path, operation, operations))
    _add_links(operations)
    for component in schemas.values():
        for field in component.get("properties", {}).values():
            field.pop("title", None)  # says what the name of the field says
    document["components"]["responses"] = _share([operation for _, operation in operations])
    return document


def _problem_sample() -> Json:
    code = "not_found"
    detail = "there is no run 0198f5a0-7c1e-7d52-9a3b-5f0c2e8d4b61"
    return {
        "type": f"urn:fedselect:problem:{code}",
        "title": "Not found",
        "status": 404,
        "detail": detail,
        "code": code,
        "request_id": "4f0d2c",
    }


def _scope(route: APIRoute) -> Scope | None:
    scopes = [getattr(each.call, "scope", None) for each in route.dependant.dependencies]
    return next((scope for scope in scopes if scope is not None), None)


def creates(operation: Json) -> bool:
    """Whether it is a creating call, which takes an ``Idempotency-Key``."""
    return "201" in operation["responses"]


def _parameters(operation: Json) -> list[Json]:
    return list(operation.get("parameters", []))


def _is_text(schema: Json) -> bool:
    return schema.get("type") == "string"


def _simplify(parameter: Json) -> None:
    """Leave out null: what stands in an address or a header is there or not."""
    schema = parameter["schema"]
    kinds = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    if len(kinds) == 1:
        parameter["schema"] = {k: v for k, v in schema.items() if k != "anyOf"} | kinds[0]
    parameter["schema"].pop("title", None)


def _add_access(operation: Json, scope: Scope | None) -> None:
    if scope is None:
        operation["security"] = []
    else:
        operation["x-scope"] = scope.value
    if creates(operation):
        operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)


# --- refusals ----------------------------------------------------------------------------------


def _add_problems(operation: Json, scope: Scope | None, path: str) -> None:
    answers = operation["responses"]
    for status, codes in _usual_codes(operation, scope, path).items():
        answer = answers.setdefault(str(status), {"description": TEXTS[status]})
        answer["x-codes"] = [*codes, *answer.get("x-codes", [])]
    for status, answer in answers.items():
        if int(status) >= 400 and "x-codes" in answer:
            answer["x-codes"] = list(dict.fromkeys(answer["x-codes"]))
            listed = ", ".join(f"`{code}`" for code in answer["x-codes"])
            answer["description"] += f" Codes: {listed}."
            answer["content"] = {"application/problem+json": {"schema": PROBLEM}}
    operation["responses"] = dict(sorted(answers.items()))


def _usual_codes(operation: Json, scope: Scope | None, path: str) -> dict[int, list[str]]:
    """What any operation of this form may answer, whatever it does."""
    if not path.startswith("/v1/"):
        return {}
    found: dict[int, list[str]] = {422: ["request_invalid"], 429: ["rate_limited"]}
    found[503] = ["database_unavailable"]
    if scope is not None:
        found[401] = ["key_missing", "key_unknown", "key_expired", "key_revoked"]
        found[401] += ["token_expired", "token_invalid", "certificate_mismatch"]
        found[403] = ["scope_missing", "member_unknown"]
        found[503].append("issuer_unavailable")
        found[404] = ["not_found"]  # the project that the header names, at least
        found[422] += ["setting_unknown", "project_required"]
        if scope in ROLES["client"]:
            found[403].append("client_suspended")
    if "requestBody" in operation:
        found[413] = ["body_too_large"]
        found[422] += ["json_invalid"] + ([] if scope else ["setting_unknown"])
    if any(p["name"] == "cursor" and _is_text(p["schema"]) for p in _parameters(operation)):
        found[422].append("cursor_invalid")
    if creates(operation):
        found[409] = ["idempotency_in_flight"]
        found[422].append("idempotency_key_reused")
    return found


TEXTS = {
    401: "No key, or one that is not valid.",
    403: "The key's role may not do this.",
    404: "Not there, or not yours.",
    409: "The present state forbids it.",
    410: "It was deleted, as the retention rules say.",
    412: "It was changed since it was read; nothing was done.",
    413: "The body is too large.",
    422: "The request is invalid; `errors` says where.",
    429: "More than one client may ask for; `Retry-After` says when there is room again.",
    503: "A server behind the coordinator does not answer.",
}


def _share(operations: list[Json]) -> Json:
    """The commonest refusal of each status, told once; operations refer to it."""
    shared: Json = {}
    for status in map(str, TEXTS):
        variants = [each["responses"].get(status) for each in operations]
        given = [repr(each) for each in variants if each is not None]
        commonest = max(given, key=given.count, default="")
        name = f"Refusal{status}"
        for operation, answer in zip(operations, variants, strict=True):
            if answer is not None and repr(answer) == commonest:
                shared[name] = answer
                operation["responses"][status] = {"$ref": f"#/components/responses/{name}"}
    return shared


# --- examples, headers, links ------------------------------------------------------------------


def _add_examples(operation: Json, schemas: Json, examples: Json) -> None:
    bodies = [operation.get("requestBody", {})]
    bodies += [each for status, each in operation["responses"].items() if status < "300"]
    for body in bodies:
        for media in (m for m in body.get("content", {}).values() if "$ref" in m["schema"]):
            name = media["schema"]["$ref"].rpartition("/")[2]
            examples[name] = {"value": sample(media["schema"], schemas)}
            media["examples"] = {name: {"$ref": f"#/components/examples/{name}"}}


def _conditional(operation: Json) -> bool:
    return any(each["name"].lower() == "if-match" for each in _parameters(operation))


def _tagged(path: str, operation: Json, operations: list[tuple[str, Json]]) -> bool:
    """Whether the answer has an entity tag: it is of a thing that can be changed, here or by an
    order one segment further, if it is still as it was read.
    """
    if not path.endswith("}") or operation["operationId"].startswith("list"):
        return _conditional(operation)
    here = re.compile(re.escape(path) + r"(/[^/]+)?")
    return any(_conditional(each) for other, each in operations if here.fullmatch(other))


def _add_headers(operation: Json, *, tagged: bool) -> None:
    """``tagged``: what stands at this path can be changed, if it is still as it was read."""
    for status, answer in operation["responses"].items():
        names = ["X-Request-Id"]
        names += ["Retry-After"] if status in {"429", "503"} and "x-codes" in answer else []
        names += ["WWW-Authenticate"] if status == "401" else []
        names += ["ETag"] if status == "200" and tagged else []
        answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
        if operation.get("deprecated") and status < "300":
            answer["headers"] |= DEPRECATION_HEADERS


def _add_links(operations: list[tuple[str, Json]]) -> None:
    takers: dict[str, list[str]] = {}
    for path, operation in operations:
        for parameter in re.findall(r"{(\w+)}", path):
            takers.setdefault(parameter, []).append(operation["operationId"])
    for _, operation in operations:
        for status, answer in operation["responses"].items():
            if status < "300":
                links = _links(answer, takers, own=operation["operationId"])
                answer.update({"links": links} if links else {})


def _links(answer: Json, takers: dict[str, list[str]], *, own: str) -> Json:
    reference = answer["content"]["application/json"]["schema"].get("$ref", "")
    listed = re.fullmatch(r"Page_(\w+)_", reference.rpartition("/")[2])
    name = listed[1] if listed else reference.rpartition("/")[2]
    if name not in LEADS_TO:
        return {}
    parameter, place = LEADS_TO[name]
    value = f"$response.body#{'/items/0' if listed else ''}{place}"
    return {
        taker: {"operationId": taker, "parameters": {parameter: value}}
        for taker in takers.get(parameter, [])
        if taker != own
    }
