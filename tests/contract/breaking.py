"""What of a change to the interface would break a client that was built on the description before.

Two documents are compared: the one in the repository and the one that the code gives. Whatever a
client may have relied on must still be there: operations, parameters, fields and values of answers;
and what it sends must still be welcome: no new duty, no narrower type, no removed value. Additions
break nothing; readers ignore what they do not know (docs/INTEGRATORS.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
METHODS = {"get", "put", "post", "patch", "delete"}
# Of a request, a smaller upper bound or a larger lower one shuts somebody out.
UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
SAME = ("format", "pattern", "const", "uniqueItems", "multipleOf")


def breaking(old: Json, new: Json) -> list[str]:
    """One sentence for each breaking change from ``old`` to ``new``."""
    return list(_Comparison(old, new).all())


class _Comparison:
    def __init__(self, old: Json, new: Json) -> None:
        self._old, self._new = old, new
        self._seen: set[tuple[str, str, bool]] = set()

    def all(self) -> Iterator[str]:
        for path, item in self._old["paths"].items():
            for method in sorted(METHODS & set(item)):
                place = f"{method.upper()} {path}"
                then, now = item[method], self._new["paths"].get(path, {}).get(method)
                if now is None:
                    yield f"{place}: removed"
                else:
                    yield from self._operation(place, then, now)

    def _operation(self, place: str, old: Json, new: Json) -> Iterator[str]:
        if old["operationId"] != new["operationId"]:
            yield f"{place}: operationId was {old['operationId']}, is {new['operationId']}"
        if not old["security"] and new["security"]:
            yield f"{place}: now needs a key"
        if old.get("x-scope") != new.get("x-scope") and old["security"]:
            yield f"{place}: needed scope {old.get('x-scope')}, needs {new.get('x-scope')}"
        yield from self._parameters(place, old, new)
        yield from self._body(f"{place} body", old.get("requestBody"), new.get("requestBody"))
        yield from self._answers(place, old["responses"], new["responses"])

    def _parameters(self, place: str, old: Json, new: Json) -> Iterator[str]:
        then, now = (
            {(p["in"], p["name"]): p for p in operation.get("parameters", [])}
            for operation in (old, new)
        )
        for key, parameter in then.items():
            where = f"{place} {key[0]} {key[1]}"
            if key not in now:
                yield f"{where}: removed"
                continue
            if now[key].get("required") and not parameter.get("required"):
                yield f"{where}: became required"
            yield from self._schema(where, parameter["schema"], now[key]["schema"], sent=True)
        for key, parameter in now.items():
            if key not in then and parameter.get("required"):
                yield f"{place} {key[0]} {key[1]}: new and required"

    def _body(self, place: str, old: Json | None, new: Json | None) -> Iterator[str]:
        if old is None:
            if new is not None and new.get("required"):
                yield f"{place}: new and required"
            return
        if new is None:
            yield f"{place}: removed"
            return
        if new.get("required") and not old.get("required"):
            yield f"{place}: became required"
        yield from self._content(place, old["content"], new["content"], sent=True)

    def _answers(self, place: str, old: Json, new: Json) -> Iterator[str]:
        for status, answer in old.items():
            where = f"{place} {status}"
            if status not in new:
                yield f"{where}: removed"
                continue
            lost = set(answer.get("x-codes", [])) - set(new[status].get("x-codes", []))
            if lost:
                yield f"{where}: codes {', '.join(sorted(lost))} removed"
            gone = set(answer.get("headers", {})) - set(new[status].get("headers", {}))
            if gone:
                yield f"{where}: headers {', '.join(sorted(gone))} removed"
            content = new[status].get("content", {})
            yield from self._content(where, answer.get("content", {}), content, sent=False)
        fresh = {status for status in set(new) - set(old) if status < "300"}
        if fresh:
            yield f"{place}: another answer of success, {', '.join(sorted(fresh))}"

    def _content(self, place: str, old: Json, new: Json, *, sent: bool) -> Iterator[str]:
        for media, content in old.items():
            if media not in new:
                yield f"{place}: {media} removed"
            else:
                yield from self._schema(place, content["schema"], new[media]["schema"], sent=sent)

    # --- schemas ---------------------------------------------------------------------------------

    def _schema(self, place: str, old: Json, new: Json, *, sent: bool) -> Iterator[str]:
        """What a client sends must not become narrower, what it receives not wider."""
        pair = (str(old.get("$ref", "")), str(new.get("$ref", "")), sent)
        if any(pair[:2]) and pair in self._seen:
            return
        self._seen.add(pair)
        old, new = _resolved(old, self._old), _resolved(new, self._new)
        then, now = _kinds(old), _kinds(new)
        missing = (then - now) if sent else (now - then)
        if missing and now != {"any"} if sent else missing and then != {"any"}:
            yield f"{place}: {'no longer' if sent else 'now also'} {', '.join(sorted(missing))}"
        yield from self._values(place, old, new, sent=sent)
        if sent:
            yield from _bounds(place, old, new)
        yield from self._fields(place, old, new, sent=sent)
        yield from self._below(place, old, new, sent=sent)

    def _values(self, place: str, old: Json, new: Json, *, sent: bool) -> Iterator[str]:
        # A new value of an answer is an addition: readers know what to do with an unknown one.
        if "enum" in new and sent:
            lost = set(old.get("enum", ["anything else"])) - set(new["enum"])
            if lost:
                yield f"{place}: value {', '.join(map(str, sorted(lost)))} no longer accepted"

    def _fields(self, place: str, old: Json, new: Json, *, sent: bool) -> Iterator[str]:
        then, now = old.get("properties", {}), new.get("properties", {})
        for name, inner in then.items():
            if name not in now:
                yield f"{place}.{name}: removed"
            else:
                yield from self._schema(f"{place}.{name}", inner, now[name], sent=sent)
        was, required = set(old.get("required", [])), set(new.get("required", []))
        for name in sorted(required - was if sent else (was - required) & set(now)):
            yield f"{place}.{name}: {'now required' if sent else 'may now be left out'}"

    def _below(self, place: str, old: Json, new: Json, *, sent: bool) -> Iterator[str]:
        for part in ("items", "additionalProperties"):
            inner = old.get(part), new.get(part)
            if all(isinstance(each, dict) for each in inner):
                yield from self._schema(f"{place}[]", *inner, sent=sent)  # type: ignore[arg-type]
        for one in old.get("anyOf", []):
            others = [each for each in new.get("anyOf", [new]) if _kinds(one) & _kinds(each)]
            if others and len(old["anyOf"]) <= 2:
                yield from self._schema(place, one, others[0], sent=sent)


def _resolved(schema: Json, document: Json) -> Json:
    if "$ref" not in schema:
        return schema
    found: Json = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _kinds(schema: Json) -> set[str]:
    """The JSON types that a schema admits; a reference counts as an object or an enumeration."""
    if "anyOf" in schema:
        return set().union(*map(_kinds, schema["anyOf"]))
    if "$ref" in schema:
        return {schema["$ref"].rpartition("/")[2]}
    kind = schema.get("type", "any")
    kinds = set(kind) if isinstance(kind, list) else {kind}
    return kinds | {"integer"} if "number" in kinds else kinds


def _bounds(place: str, old: Json, new: Json) -> Iterator[str]:
    for word in UPPER:
        if new.get(word, float("inf")) < old.get(word, float("inf")):
            yield f"{place}: {word} was {old.get(word, 'none')}, is {new[word]}"
    for word in LOWER:
        if new.get(word, float("-inf")) > old.get(word, float("-inf")):
            yield f"{place}: {word} was {old.get(word, 'none')}, is {new[word]}"
    for word in SAME:
        if word in new and new[word] != old.get(word):
            yield f"{place}: {word} was {old.get(word, 'none')}, is {new[word]}"
    if new.get("additionalProperties") is False and old.get("additionalProperties") is not False:
        yield f"{place}: unknown fields are now refused"
