"""Update and version files: round trips, golden bytes, and every bad input with its own code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import (
    DIM,
    GOLDEN,
    MASK,
    META,
    SPACE,
    THETA,
    UPPER,
    again,
    known,
    mask_of,
    plan,
    take_apart,
    update,
)

from fedselect import wire
from fedselect.errors import WireError
from fedselect.masks import Mask

FAST = settings(max_examples=100, deadline=None, derandomize=True)
FUZZ = settings(max_examples=600, deadline=None, derandomize=True)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)

# --- round trips -------------------------------------------------------------------------------


@FAST
@given(
    st.lists(FINITE, min_size=DIM, max_size=DIM),
    st.sets(st.sampled_from(np.flatnonzero(UPPER.to_bool()).tolist())),
    st.integers(1, wire.MAX_EXAMPLES),
    st.integers(0, 50),
)
def test_an_update_comes_back_bit_for_bit(theta, personal, examples, version):
    mask, vector = mask_of(*personal), np.array(theta, dtype=np.float32)
    data = update(mask=mask, theta=vector, examples=examples, mask_version=version + 1)
    found = wire.decode_update(data, plan(known_mask_version=version))
    assert found.meta == replace(META, examples=examples, mask_version=version + 1)
    assert found.mask == mask
    assert found.mask_sent
    assert found.values.tobytes() == vector[~mask.to_bool()].tobytes()
    assert again(found) == data


@FAST
@given(st.lists(FINITE, min_size=DIM, max_size=DIM))
def test_a_version_comes_back_bit_for_bit(theta):
    vector = np.array(theta, dtype=np.float32)
    data = wire.encode_version(SPACE.digest, vector)
    found = wire.decode_version(data, space_digest=SPACE.digest, dim=DIM)
    assert found.tobytes() == vector.tobytes()
    head = wire.version_head(SPACE.digest, DIM)
    assert data == head + vector.tobytes()
    assert wire.header_size(data) == len(head)


def test_an_unchanged_mask_is_left_out():
    data = update(send_mask=False)
    assert len(data) < len(update())
    found = wire.decode_update(data, known())
    assert found.mask == MASK
    assert not found.mask_sent
    assert again(found) == data


def test_a_changed_mask_is_sent_and_counted():
    grown = mask_of(0, 4, 10, 17, 1)
    data = update(mask=grown, mask_version=2)
    assert wire.decode_update(data, known()).mask == grown


def test_every_section_is_aligned():
    for data in (update(), wire.encode_version(SPACE.digest, THETA)):
        layout = take_apart(data)[0]
        assert wire.header_size(data) % 8 == 0
        for name, entry in layout.items():
            if name != "__metadata__":
                size = {"U64": 8, "F32": 4, "U8": 1}[entry["dtype"]]
                assert entry["data_offsets"][0] % size == 0


def test_the_safetensors_library_reads_both_files(tmp_path):
    path = tmp_path / "update.safetensors"
    path.write_bytes(update())
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == wire.UPDATE_FORMAT
        assert file.metadata()["examples"] == "120"
        assert np.array_equal(file.get_tensor("values"), THETA[~MASK.to_bool()])
        assert np.array_equal(file.get_tensor("mask"), MASK.packed)
        assert np.array_equal(file.get_tensor("block_rank"), MASK.block_rank())
    tensors = safetensors.numpy.load(wire.encode_version(SPACE.digest, THETA))
    assert list(tensors) == ["values"]
    assert np.array_equal(tensors["values"], THETA)


# --- golden files ------------------------------------------------------------------------------

# These bytes are a promise to every client in the field. A change of the format gets a new
# format name and new files; these stay.
PINNED = {
    "coded-bf16-first": "437aaa4fdb6228785acc6985696344f1a3e8406c565d8bc92baf3dcf6435ae08",
    "coded-int8-first": "c7e637072711502c5090d6e822140b4f1b3cc2498b0070f1cb65bbeb964adf29",
    "coded-int8-two-blocks": "63f1245cd3cf267fbb20a36b3470589125172670acefaeaf3fffb5093b0fa3b8",
    "delta-bf16": "65766a5b1f02efa86a849467778942653bde49523c4f1aaf48b1b18d41b2cff6",
    "delta-int8": "604bd8a0e21f2e8e2dcfb1130580b183055b5eaa6396267c344064e8ddad56fe",
    "update-first": "a29d382d4754727de658390b59ba83259bde2f528a24ff1fc2be6ec0e7d12c3e",
    "update-mask-unchanged": "2848ea6d5764794650466d593283fbb5e07cd26173174e23e3f7ff5f7714d7e2",
    "update-nothing-shared": "33b49bb32b2555e40a59b5e50fe90d580d5bb92caa60b64b955f7ea45984d9e1",
    "update-two-blocks": "63130b870bd15f350aefc1d8f3714e69330535d90d5210b98c6186edc4911da4",
    "version": "6258b401f3553495f332a92aa2e69de42fc38c43d1e3aa92b0d60135bbb892fb",
}


def golden(name: str) -> tuple[bytes, dict]:
    return (GOLDEN / f"{name}.safetensors").read_bytes(), json.loads(
        (GOLDEN / f"{name}.json").read_text()
    )


def test_no_golden_file_is_added_or_lost_silently():
    assert {path.stem for path in GOLDEN.iterdir()} == set(PINNED)


@pytest.mark.parametrize("name", PINNED)
def test_golden_bytes_never_change(name):
    data, expected = golden(name)
    assert hashlib.sha256(data).hexdigest() == expected["sha256"] == PINNED[name]
    assert wire.file_digest(data) == PINNED[name]


@pytest.mark.parametrize("name", [name for name in PINNED if name.startswith("update")])
def test_golden_updates(name):
    data, expected = golden(name)
    dim, meta = expected["elements"], wire.UpdateMeta(**expected["metadata"])
    personal = np.ones(dim, dtype=np.bool_)
    personal[expected["shared"]] = False
    mask, values = Mask.from_bool(personal), np.array(expected["values"], dtype=np.float32)
    held = {"known_mask": None if expected["mask_sent"] else mask}
    held["known_mask_version"] = meta.mask_version - expected["mask_sent"]
    open_plan = plan(meta, lower=Mask.empty(dim), upper=Mask.full(dim), **held)
    found = wire.decode_update(data, open_plan)
    assert (found.meta, found.mask, found.mask_sent) == (meta, mask, expected["mask_sent"])
    assert found.values.tobytes() == values.tobytes()
    assert again(found) == data


def test_golden_version():
    data, expected = golden("version")
    space, values = expected["metadata"]["space"], np.array(expected["values"], dtype=np.float32)
    found = wire.decode_version(data, space_digest=space, dim=expected["elements"])
    assert found.tobytes() == values.tobytes()
    assert wire.encode_version(space, values) == data


# --- mutation fuzz -----------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "swap"]),
        st.integers(0, 10_000),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    changed = bytearray(data)
    for kind, place, value in edits:
        at = place % max(len(changed), 1)
        if kind == "insert":
            changed.insert(at, value)
        elif kind == "delete":
            del changed[at : at + value % 9]
        elif kind == "swap" and changed:
            other = value % len(changed)
            changed[at], changed[other] = changed[other], changed[at]
        elif changed:
            changed[at] = value if kind == "set" else changed[at] ^ (1 << value % 8)
    return bytes(changed)


@FUZZ
@given(st.booleans(), EDITS)
def test_a_mutated_update_is_refused_or_says_exactly_what_it_says(send_mask, edits):
    data = mutate(update(send_mask=send_mask), edits)
    try:
        found = wire.decode_update(data, plan() if send_mask else known())
    except WireError:
        return
    assert again(found) == data


@FUZZ
@given(EDITS)
def test_a_mutated_version_is_refused_or_says_exactly_what_it_says(edits):
    data = mutate(wire.encode_version(SPACE.digest, THETA), edits)
    try:
        values = wire.decode_version(data, space_digest=SPACE.digest, dim=DIM)
    except WireError:
        return
    assert wire.encode_version(SPACE.digest, values) == data


@FAST
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises(WireError):
        wire.decode_update(data, plan())


@pytest.mark.parametrize("bit", range(8))
def test_every_single_bit_flip(bit):
    data = update()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        try:
            found = wire.decode_update(bytes(flipped), plan())
        except WireError:
            continue
        assert again(found) == bytes(flipped)
