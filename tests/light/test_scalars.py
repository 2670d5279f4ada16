"""Requests take numbers and truth values for what they are: the description promises it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from app.main import MODULES
from fedselect.policies import Settings
from fedselect.protocol import Request

PLAIN = {bool: ("true", 1, 0, 1.0), int: ("1", True, False, 1.5, "1.0"), float: ("1", True, "1e3")}


def _below(family: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for model in family.__subclasses__():
        yield model
        yield from _below(model)


def _fields() -> Iterator[Any]:
    assert MODULES, "the routes, and with them all documents, are loaded"
    for model in [*_below(Request), *_below(Settings)]:
        for name, field in model.model_fields.items():
            bases = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in PLAIN:
                if kind in [getattr(base, "__origin__", base) for base in bases]:
                    yield pytest.param(model, name, kind, id=f"{model.__name__}.{name}")


FIELDS = list(_fields())


def test_there_are_such_fields() -> None:
    assert len(FIELDS) > 30


@pytest.mark.parametrize(("model", "name", "kind"), FIELDS)
def test_nothing_is_converted(model: type[BaseModel], name: str, kind: type[Any]) -> None:
    field = model.model_fields[name]
    reader: TypeAdapter[Any] = TypeAdapter(model)
    for wrong in PLAIN[kind]:
        with pytest.raises(ValidationError) as refusal:
            reader.validate_python({name: wrong})
        found = [error for error in refusal.value.errors() if error["loc"][0] == name]
        assert found, f"{wrong!r} was taken for {field.annotation}"
