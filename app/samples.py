"""Examples for the interface's description, made from the schemas themselves.

Owns what a value of a schema looks like: the example a field names, its default, or a plausible
value for its format or name. Must not know routes.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
_FORMATS = {
    "uuid": "0198f5a0-7c1e-7d52-9a3b-5f0c2e8d4b61",
    "date-time": "2026-03-02T09:30:00Z",
}
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_ID = _FORMATS["uuid"]
_WORDS = {
    "arm": _ID,
    "base_object": f"versions/{_ID}/2",
    "client": _ID,
    "client_name": "ward-7",
    "code_version": "0.1.0",
    "hashes": _DIGEST,
    "headers": "631",
    "id": "5c1f0a9be2d34786",
    "key": "fsk_5c1f0a9be2d34786_…",
    "kind": "verify",
    "leaf": _DIGEST,
    "mask_object": f"masks/{_ID}/{_DIGEST}",
    "md5": "5d41402abc4b2a76b9719d911017c592",
    "name": "ward-7",
    "object": f"accepted/{_ID}/{_DIGEST}",
    "public_key": "fedselect/main+1c2d3e4f+AS…",
    "role": "operator",
    "run": _ID,
    "scopes": "round:read",
    "secret": "whsec_…",
    "space": _DIGEST,
    "state": "due",
    "tags": "surgery",
    "text": "fedselect/main\n42\nn4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1s…\n\n— fedselect/main …\n",
    "token": "fse_0b7e6f1c2d3a4958_…",
    "tokens": "fse_0b7e6f1c2d3a4958_…",
    "url": "https://store.example.org/fedselect/staging/4bf3a1?X-Amz-Expires=900&X-Amz-Signature=…",
    "version": "0.1.0",
}
# What may be null, and is while all goes well.
_UNSAID = {"detail", "error", "predecessor_id", "reason"}
_UNSAID |= {"client_id", "lease_until", "revoked_at", "scopes"}
_KEYS = {"headers": "Content-Length", "scores": "post"}
_COUNTS = {"size": 631, "status": 404}


def sample(schema: Json, schemas: Json, name: str = "") -> Any:
    """A value that fits ``schema``; ``schemas`` are those that references lead to."""
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    for told in ("example", "const", "default"):
        if told in schema:
            return schema[told]
    if schema.get("examples"):
        return schema["examples"][0]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        said = name not in _UNSAID or {"type": "null"} not in schema["anyOf"]
        return sample(schema["anyOf"][0], schemas, name) if said else None
    return _composed(schema, schemas, name)


def _composed(schema: Json, schemas: Json, name: str) -> Any:
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        fields = schema["properties"].items()
        shown = {field: inner for field, inner in fields if _says(inner, field, schema)}
        return {field: sample(inner, schemas, field) for field, inner in shown.items()}
    if kind == "object":
        inner = schema.get("additionalProperties")
        keys = schema.get("propertyNames", {}).get("enum") or [_KEYS.get(name, "name")]
        return {keys[0]: sample(inner, schemas, name)} if isinstance(inner, dict) else {}
    if kind == "array":
        return [sample(schema.get("items", {}), schemas, name)]
    if kind in {"integer", "number"}:
        return _COUNTS.get(name, max(1, schema.get("minimum", 1)))
    if kind == "boolean":
        return False
    return _FORMATS.get(schema.get("format", "")) or _word(name)


def _says(inner: Json, field: str, schema: Json) -> bool:
    """Whether the example shows this field: not if it may be left out and nothing speaks for it."""
    return field in schema.get("required", []) or bool(inner.keys() & {"default", "examples"})


def _word(name: str) -> str:
    if name.endswith(("sha256", "digest")):
        return _DIGEST
    return _WORDS.get(name, name or "text")
