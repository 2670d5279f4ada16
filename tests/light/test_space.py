"""Parameter spaces: layout, digest, strict reading, flatten and back."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from fedselect.errors import SpaceError
from fedselect.space import DEFAULT_ROLES, MAX_ELEMENTS, Kind, ParameterSpace, Role

NAMES = st.text("abcdefgé.0_", min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.lists(
    st.tuples(NAMES, SHAPES, st.sampled_from(Kind), st.sampled_from(Role)),
    min_size=1,
    max_size=8,
    unique_by=lambda tensor: tensor[0],
)
FAST = settings(max_examples=100, deadline=None, derandomize=True)


def small() -> ParameterSpace:
    return ParameterSpace.of(
        [
            ("conv.weight", (2, 3), Kind.WEIGHT, Role.SELECTABLE),
            ("conv.bias", (2,), Kind.BIAS, Role.SHARED),
            ("bn.running_mean", (2,), Kind.BUFFER, Role.PERSONAL),
            ("embed.weight", (3,), Kind.WEIGHT, Role.FROZEN),
            ("head.weight", (2, 2), Kind.WEIGHT, Role.SELECTABLE),
            ("head.bias", (2,), Kind.BIAS, Role.SHARED),
        ]
    )


def spaces() -> st.SearchStrategy[ParameterSpace]:
    def build(tensors):
        tensors = [*tensors, ("zz.shared", (2,), Kind.BIAS, Role.SHARED)]
        return ParameterSpace.of(tensors)

    return TENSORS.map(build)


@FAST
@given(spaces())
def test_slots_lie_end_to_end(space):
    assert space.slots[0].offset == 0
    for left, right in pairwise(space.slots):
        assert left.stop == right.offset
    assert space.dim == sum(slot.size for slot in space.slots) == space.slots[-1].stop
    assert sum(space.count(role) for role in Role) == space.dim


@FAST
@given(spaces())
def test_json_round_trip_keeps_the_digest(space):
    document = json.loads(json.dumps(space.to_json()))
    assert ParameterSpace.from_json(document) == space
    assert ParameterSpace.from_json(document).digest == space.digest
    assert space.digest == hashlib.sha256(rfc8785.dumps(space.to_json())).hexdigest()


@FAST
@given(spaces())
def test_flatten_and_back(space):
    flat = np.arange(space.dim, dtype=np.float32)
    tensors = space.unflatten(flat)
    assert {name: array.shape for name, array in tensors.items()} == {
        slot.name: slot.shape for slot in space.slots
    }
    assert np.array_equal(space.flatten(tensors), flat)


def test_the_digest_depends_on_name_shape_kind_role_and_order():
    tensors = [
        ("a", (4,), Kind.WEIGHT, Role.SELECTABLE),
        ("b", (2,), Kind.BIAS, Role.SHARED),
    ]
    variants = [
        tensors,
        tensors[::-1],
        [("c", *tensors[0][1:]), tensors[1]],
        [("a", (2, 2), *tensors[0][2:]), tensors[1]],
        [("a", (4,), Kind.NORM, Role.SELECTABLE), tensors[1]],
        [("a", (4,), Kind.WEIGHT, Role.SHARED), tensors[1]],
    ]
    assert len({ParameterSpace.of(variant).digest for variant in variants}) == len(variants)


def test_the_head_is_the_last_module_with_a_selectable_tensor():
    assert [slot.name for slot in small().head()] == ["head.weight", "head.bias"]
    shared = ParameterSpace.of([("a.bias", (2,), Kind.BIAS, Role.SHARED)])
    with pytest.raises(SpaceError, match="no selectable tensor"):
        shared.head()


def test_module_and_roles():
    space = small()
    assert space.by_name["conv.weight"].module == "conv"
    assert ParameterSpace.of([("w", (1,), Kind.BIAS, Role.SHARED)]).slots[0].module == ""
    assert [slot.name for slot in space.with_role(Role.PERSONAL, Role.FROZEN)] == [
        "bn.running_mean",
        "embed.weight",
    ]
    assert DEFAULT_ROLES[Kind.BIAS] is Role.SHARED
    assert DEFAULT_ROLES[Kind.BUFFER] is Role.PERSONAL
    assert set(DEFAULT_ROLES) == set(Kind)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([("a", (1,), Kind.BIAS, Role.SHARED)] * 2, "listed twice"),
        ([("", (1,), Kind.BIAS, Role.SHARED)], "printable"),
        ([("x" * 256, (1,), Kind.BIAS, Role.SHARED)], "printable"),
        ([("a\n", (1,), Kind.BIAS, Role.SHARED)], "printable"),
        ([("a\ud800", (1,), Kind.BIAS, Role.SHARED)], "printable"),
        ([("a", (-1,), Kind.BIAS, Role.SHARED)], "impossible shape"),
        ([("a", (1,) * 17, Kind.BIAS, Role.SHARED)], "impossible shape"),
        ([("a", (MAX_ELEMENTS + 1,), Kind.BIAS, Role.SHARED)], "impossible shape"),
        ([("a", (MAX_ELEMENTS, 2), Kind.BIAS, Role.SHARED)], "beyond the limits"),
        ([("a", (1,), Kind.BUFFER, Role.PERSONAL)], "nothing to federate"),
        ([("a", (0,), Kind.BIAS, Role.SHARED)], "nothing to federate"),
        ([], "nothing to federate"),
    ],
)
def test_impossible_spaces(tensors, text):
    with pytest.raises(SpaceError, match=text):
        ParameterSpace.of(tensors)


def test_too_many_tensors():
    with pytest.raises(SpaceError, match="beyond the limits"):
        ParameterSpace.of((f"t{i}", (1,), Kind.BIAS, Role.SHARED) for i in range(20_001))


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"name": None},
        {"shape": "12"},
        {"shape": [2.0]},
        {"shape": [True]},
        {"shape": ["2"]},
        {"shape": None},
        {"shape": {"2": 1}},
        {"kind": "tensor"},
        {"role": "mine"},
        {"role": None},
    ],
)
def test_from_json_is_strict(change):
    row = {"name": "a", "shape": [2], "kind": "bias", "role": "shared"}
    assert ParameterSpace.from_json({"tensors": [row]}).dim == 2
    with pytest.raises(SpaceError):
        ParameterSpace.from_json({"tensors": [row | change]})


@pytest.mark.parametrize("document", [None, [], {}, {"tensors": None}, {"tensors": [1]}, "x"])
def test_from_json_of_something_else(document):
    with pytest.raises(SpaceError, match="not a parameter space"):
        ParameterSpace.from_json(document)


@pytest.mark.parametrize("missing", ["name", "shape", "kind", "role"])
def test_from_json_needs_every_field(missing):
    row = {"name": "a", "shape": [2], "kind": "bias", "role": "shared"}
    row.pop(missing)
    with pytest.raises(SpaceError, match="not a parameter space"):
        ParameterSpace.from_json({"tensors": [row]})


def test_flatten_refuses_what_does_not_fit():
    space = small()
    tensors = space.unflatten(np.zeros(space.dim, dtype=np.float32))
    with pytest.raises(SpaceError, match="missing"):
        space.flatten({name: a for name, a in tensors.items() if name != "conv.bias"})
    with pytest.raises(SpaceError, match="has shape"):
        space.flatten(tensors | {"conv.bias": np.zeros((1, 2))})
    with pytest.raises(SpaceError, match="not one of"):
        space.unflatten(np.zeros(space.dim + 1, dtype=np.float32))
