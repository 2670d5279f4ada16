"""A file in pieces is judged as the same file in one piece."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_samples import DIM, MASK, META, SPACE, THETA, known, plan, update

from fedselect import wire
from fedselect.errors import WireError
from fedselect.inspection import UpdateInspection, VersionInspection
from fedselect.masks import BLOCK, Mask
from fedselect.space import Kind, ParameterSpace, Role

LIMITED = plan(max_abs=1.2, max_norm=2.6)  # the norm of an honest update is 2.40...
PLANS = [plan(), known(), LIMITED]


def whole(data, expected):
    try:
        found = wire.decode_update(data, expected)
    except WireError as error:
        return error.code, str(error)
    return found.mask, found.mask_sent, found.meta.examples


def pieces(data, expected, cuts):
    inspection = UpdateInspection(expected, len(data))
    try:
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            inspection.feed(data[start:stop])
        found = inspection.finish()
    except WireError as error:
        return error.code, str(error)
    return found.mask, found.mask_sent, found.examples


@st.composite
def damaged(draw):
    data = bytearray(update(send_mask=draw(st.booleans())))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data) - 1))
        change = draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if change == "set":
            data[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[place : place + draw(st.integers(1, 9))]
        elif change == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        else:
            del data[place + 1 :]
    cuts = draw(st.lists(st.integers(0, len(data)), max_size=5))
    return bytes(data), sorted(cuts)


@given(damaged(), st.sampled_from(PLANS))
def test_a_stream_is_judged_as_the_whole_file(file, expected):
    data, cuts = file
    inspected, decoded = pieces(data, expected, cuts), whole(data, expected)
    if decoded[0] == "file_truncated":  # the texts count the bytes of head and file
        assert inspected[0] == "file_truncated"
    else:
        assert inspected == decoded


@given(st.lists(st.integers(0, 4 * BLOCK * 3), max_size=6))
def test_the_norm_does_not_depend_on_the_pieces(cuts):
    space = ParameterSpace.of([("w", (2 * BLOCK + 5,), Kind.WEIGHT, Role.SHARED)])
    theta = np.random.default_rng(1).normal(size=space.dim).astype(np.float32)
    norm = float(np.sqrt(np.square(theta.astype(np.float64)).sum()))
    bounds = Mask.empty(space.dim)
    meta = wire.UpdateMeta(space.digest, "r", 1, "a", "b", 1, 1)
    data = wire.encode_update(meta, theta, mask=bounds, send_mask=True)
    for bound in (norm * (1 - 1e-12), norm, norm * (1 + 1e-12)):
        expected = plan(meta, lower=bounds, upper=bounds, max_norm=bound)
        inside = sorted(min(cut, len(data)) for cut in cuts)
        assert pieces(data, expected, inside) == whole(data, expected)


def test_bounds_of_magnitude_and_norm():
    def with_theta(theta, **limits):
        return whole(update(theta=np.float32(theta)), plan(**limits))[0]

    largest = float(np.abs(THETA[~MASK.to_bool()]).max())
    norm = float(np.linalg.norm(THETA[~MASK.to_bool()].astype(np.float64)))
    assert isinstance(with_theta(THETA, max_abs=largest, max_norm=norm), Mask)
    assert with_theta(THETA, max_abs=largest * 0.999) == "value_too_large"
    assert with_theta(-THETA, max_abs=largest * 0.999) == "value_too_large"
    assert with_theta(THETA, max_norm=norm * 0.999) == "norm_too_large"
    personal = THETA.copy()
    personal[MASK.to_bool()] = 1e30
    assert isinstance(with_theta(personal, max_abs=largest, max_norm=norm), Mask)


@pytest.mark.parametrize("size", [-1, 1])
def test_another_size_than_announced(size):
    data = update()
    inspection = UpdateInspection(plan(), len(data) + size)
    with pytest.raises(WireError, match=r"bytes"):
        inspection.feed(data)


def test_a_version_in_pieces():
    data = wire.encode_version(SPACE.digest, THETA)
    for broken in (data, data[:-1], data[:50], data[:3], data + b"!", data[:-4] + b"\0\0\xc0\x7f"):
        assert _in_bytes(broken) == _at_once(broken)


def _at_once(data):
    try:
        wire.decode_version(data, space_digest=SPACE.digest, dim=DIM)
    except WireError as error:
        return error.code


def _in_bytes(data):
    inspection = VersionInspection(space_digest=SPACE.digest, dim=DIM, size=len(data))
    try:
        for place in range(len(data)):
            inspection.feed(data[place : place + 1])
        inspection.finish()
    except WireError as error:
        return error.code


def test_memory_does_not_grow_with_the_values():
    dim = 4_000_000
    space = ParameterSpace.of([("w", (dim,), Kind.WEIGHT, Role.SHARED)])
    bounds = Mask.empty(dim)
    meta = wire.UpdateMeta(space.digest, "r", 1, "a", META.base_version, 1, 1)
    data = wire.encode_update(meta, np.ones(dim, np.float32), mask=bounds, send_mask=True)
    inspection = UpdateInspection(plan(meta, lower=bounds, upper=bounds), len(data))
    tracemalloc.start()
    for start in range(0, len(data), 2**20):
        inspection.feed(data[start : start + 2**20])
    assert inspection.finish().mask == bounds
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20, "16 MB of values, 0.5 MB of mask"
