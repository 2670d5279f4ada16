"""Delta files (fedselect-update/2): round trips, golden bytes, streams, and every bad input."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import (
    DIM,
    GOLDEN,
    MASK,
    META,
    UPPER,
    coded,
    known,
    mask_of,
    plan,
    put_together,
    take_apart,
    update,
)

from fedselect import wire
from fedselect.aggregate import Contribution, aggregate, reference
from fedselect.deltas import DELTA_ENCODINGS, quantise, scale_counts
from fedselect.errors import WireError
from fedselect.inspection import UpdateInspection
from fedselect.masks import BLOCK, Mask

FAST = settings(max_examples=60, deadline=None, derandomize=True)
FUZZ = settings(max_examples=400, deadline=None, derandomize=True)
MODEST = st.floats(-(2.0**99), 2.0**99, width=32)
LARGE = 2 * BLOCK + 1000
OPEN = {"lower": Mask.empty(LARGE), "upper": Mask.full(LARGE)}


def refused(data: bytes, expected: wire.UpdatePlan | None = None) -> str:
    """The code of the refusal, by the decoder of whole files and by that of streams."""
    expected = expected or plan(encoding="int8")
    with pytest.raises(WireError) as caught:
        wire.decode_update(data, expected)
    with pytest.raises(WireError) as streamed:
        in_pieces(data, expected)
    assert str(streamed.value) == str(caught.value)
    assert streamed.value.code == caught.value.code
    return caught.value.code


def in_pieces(data: bytes, expected: wire.UpdatePlan, step: int = 7):
    inspection = UpdateInspection(expected, len(data))
    for start in range(0, len(data), step):
        inspection.feed(data[start : start + step])
    return inspection.finish()


def large(encoding, share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    mask = Mask.from_bool(rng.random(LARGE) < share)
    return mask, rng.normal(size=LARGE).astype(np.float32)


# --- round trips -------------------------------------------------------------------------------


@FAST
@given(
    st.sampled_from(DELTA_ENCODINGS),
    st.lists(MODEST, min_size=DIM, max_size=DIM),
    st.sets(st.sampled_from(np.flatnonzero(UPPER.to_bool()).tolist())),
)
def test_deltas_come_back_as_quantised(encoding, delta, personal):
    mask, vector = mask_of(*personal), np.array(delta, dtype=np.float32)
    data = coded(encoding, mask=mask, delta=vector)
    expected = plan(encoding=encoding)
    found = wire.decode_update(data, expected)
    codes = quantise(vector, encoding, mask)
    assert found.codes.codes.tobytes() == codes.codes.tobytes()
    assert found.codes.scales.tobytes() == codes.scales.tobytes()
    counts = scale_counts(mask.packed, mask.dim)
    assert found.values.tobytes() == codes.values(counts).tobytes()
    assert wire.update_values(data, mask).tobytes() == found.values.tobytes()
    assert (found.mask, found.mask_sent) == (mask, True)
    again = wire.encode_delta(found.meta, found.codes, mask=found.mask, send_mask=True)
    assert again == data
    facts = in_pieces(data, expected)
    assert (facts.mask, facts.mask_sent, facts.examples) == (mask, True, META.examples)


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
@pytest.mark.parametrize("share", [0, 0.5, 0.999, 1])
def test_several_blocks(encoding, share):
    mask, delta = large(encoding, share)
    data = coded(encoding, mask=mask, delta=delta)
    expected = plan(encoding=encoding, **OPEN)
    found = wire.decode_update(data, expected)
    assert found.values.size == mask.shared == len(found.codes.codes)
    assert in_pieces(data, expected, 100_000).mask == mask
    assert in_pieces(data, expected, 4099).mask == mask


def test_a_mask_travels_as_its_difference_or_not_at_all():
    old, delta = large("int8", 0.5)
    grown = Mask.from_bool(old.to_bool() | (np.arange(LARGE) % 1000 == 0))
    expected = plan(encoding="int8", known_mask=old, known_mask_version=1, **OPEN)
    whole = coded(mask=grown, delta=delta, mask_version=2)
    short = coded(mask=grown, delta=delta, mask_version=2, old=old)
    assert len(short) < len(whole) - LARGE / 10
    for data in (whole, short):
        assert wire.decode_update(data, expected).mask == grown
        assert in_pieces(data, expected, 5000).mask == grown
    without = replace(expected, known_mask=None, known_mask_version=1)
    assert refused(short, without) == "mask_missing"
    kept = coded(mask=old, delta=delta, send_mask=False)
    found = wire.decode_update(kept, expected)
    assert (found.mask, found.mask_sent) == (old, False)
    assert in_pieces(kept, expected, 5000).mask == old


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
def test_feedback_gives_back_what_an_encoding_loses(encoding):
    mask, delta = large(encoding)
    rest = np.full_like(delta, np.nan)
    codes = quantise(delta, encoding, mask, rest=rest)
    shared = ~mask.to_bool()
    assert not rest[mask.to_bool()].any()
    values = codes.values(scale_counts(mask.packed, LARGE))
    assert np.allclose(values + rest[shared], delta[shared], rtol=0, atol=1e-6)
    # Of a delta that stays the same, ten rounds bring ten times as much, up to one step.
    sent, rest = np.zeros(mask.shared), np.zeros_like(delta)
    for _ in range(10):
        codes = quantise(delta + rest, encoding, mask, rest=rest)
        sent += codes.values(scale_counts(mask.packed, LARGE))
    once = np.abs(values - delta[shared]).max()
    assert np.abs(sent - 10 * delta[shared]).max() < 2 * once + 1e-4


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_sums_of_decoded_deltas_are_canonical(encoding, weight):
    parts = []
    for seed in range(11):
        mask, delta = large(encoding, seed=seed)
        data = coded(encoding, mask=mask, delta=delta)
        parts.append(Contribution(mask, wire.update_values(data, mask), weight))
    base = np.zeros(LARGE, np.float32)
    assert aggregate(base, parts, 2).tobytes() == reference(base, parts, 2).tobytes()


def test_a_stream_is_judged_with_the_memory_of_a_frame():
    dim = 4_000_000
    mask = Mask.from_bool(np.arange(dim) % 3 == 0)
    delta = np.random.default_rng(0).standard_normal(dim, dtype=np.float32)
    data = coded(mask=mask, delta=delta)
    expected = plan(encoding="int8", lower=Mask.empty(dim), upper=Mask.full(dim))
    inspection = UpdateInspection(expected, len(data))
    tracemalloc.start()
    for start in range(0, len(data), 2**20):
        inspection.feed(data[start : start + 2**20])
    assert inspection.finish().mask == mask
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20, "11 MB of float32 values, 0.5 MB of mask, whose chunk is unpacked"


# --- golden files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16-first", "int8-first", "int8-two-blocks"])
def test_golden_files_say_what_they_said(name):
    """Their bytes are pinned in test_wire; another DEFLATE may write other ones that say it."""
    data = (GOLDEN / f"coded-{name}.safetensors").read_bytes()
    expected = json.loads((GOLDEN / f"coded-{name}.json").read_text())
    dim, meta = expected["elements"], wire.UpdateMeta(**expected["metadata"])
    mask, old = (without(dim, expected[key]) for key in ("shared", "known_shared"))
    held = plan(meta, encoding=meta.encoding, lower=Mask.empty(dim), upper=Mask.full(dim))
    if expected["known_shared"]:
        held = replace(held, known_mask=old, known_mask_version=meta.mask_version - 1)
    found = wire.decode_update(data, held)
    assert (found.meta, found.mask, found.mask_sent) == (meta, mask, True)
    assert found.codes.codes.tolist() == expected["codes"]
    assert found.codes.scales.astype(float).tolist() == expected["scales"]
    assert found.values.tolist() == expected["values"]
    delta = np.zeros(dim, np.float32)
    delta[expected["shared"]] = expected["delta"]
    again = coded(
        meta.encoding,
        mask=mask,
        delta=delta,
        old=old if expected["known_shared"] else None,
        **{k: v for k, v in expected["metadata"].items() if k != "encoding"},
    )
    assert wire.decode_update(again, held).codes.codes.tolist() == expected["codes"]
    assert len(again) == pytest.approx(len(data), abs=64)


def without(dim: int, shared: list[int]) -> Mask:
    personal = np.ones(dim, dtype=np.bool_)
    personal[shared] = False
    return Mask.from_bool(personal)


# --- what is refused ---------------------------------------------------------------------------


def test_the_encoding_is_the_runs():
    for encoding in DELTA_ENCODINGS:
        other = "int8" if encoding == "bf16" else "bf16"
        assert refused(coded(encoding), plan(encoding=other)) == "encoding_unknown"
        assert refused(coded(encoding), plan()) == "encoding_unknown"
        assert refused(update(), plan(encoding=encoding)) == "encoding_unknown"
        assert refused(update(encoding=encoding), plan(encoding=encoding)) == "encoding_unknown"


@pytest.mark.parametrize("elements", ["18", "20", "019", "-19", "x", "", "9" * 15, "9" * 16])
def test_the_number_of_elements_is_the_spaces(elements):
    data = coded()
    header, payload = take_apart(data)
    header["__metadata__"]["elements"] = elements
    code = refused(put_together(header, payload))
    assert code == ("space_mismatch" if elements in {"18", "20"} else "header_invalid")


def rebuilt(data: bytes, **sections: bytes) -> bytes:
    """A delta file with other bytes in some sections, and a header that says so."""
    header, payload = take_apart(data)
    offset, parts, width = 0, [], {"U64": 8, "U32": 4, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            piece = sections.get(name, payload[start:stop])
            entry["shape"] = [len(piece) // width[entry["dtype"]]]
            entry["data_offsets"] = [offset, offset + len(piece)]
            offset += len(piece)
            parts.append(piece)
    return put_together(header, b"".join(parts))


def lengths_of(*numbers: int) -> bytes:
    return np.array(numbers, dtype="<u4").tobytes()


def section(data: bytes, name: str) -> bytes:
    header, payload = take_apart(data)
    start, stop = header[name]["data_offsets"]
    return payload[start:stop]


def test_tables_that_do_not_fit():
    data = coded()
    values = section(data, "values")
    assert rebuilt(data) == data
    assert refused(rebuilt(data, lengths=lengths_of(13, 13))) == "frames_invalid"
    assert refused(rebuilt(data, lengths=b"")) == "frames_invalid"
    assert refused(rebuilt(data, lengths=lengths_of(14))) == "frames_invalid"
    assert refused(rebuilt(data, lengths=lengths_of(0))) == "frames_invalid"
    assert refused(rebuilt(data, lengths=lengths_of(12))) == "values_length"
    assert refused(rebuilt(data, values=values + b"x")) == "values_length"
    assert refused(rebuilt(data, values=values[:-1])) == "values_length"
    assert refused(rebuilt(data, values=bytes(100))) == "values_length"
    ranks = np.array([0, 14], dtype="<u8").tobytes()
    assert refused(rebuilt(data, block_rank=ranks)) == "block_rank_invalid"
    assert refused(rebuilt(data, block_rank=ranks + bytes(8))) == "block_rank_invalid"


def test_codes_and_scales_that_cannot_be():
    data = coded()
    values = section(data, "values")
    for scale, code in (
        (np.nan, "values_not_finite"),
        (np.inf, "values_not_finite"),
        (-1.0, "code_invalid"),
        (-0.0, "code_invalid"),
        (0.0, "code_invalid"),
    ):
        assert refused(rebuilt(data, values=struct.pack("<f", scale) + values[4:])) == code
    assert refused(rebuilt(data, values=values[:-1] + b"\x80")) == "code_invalid"
    loud = struct.pack("<f", 3e38) + values[4:]
    limited = plan(encoding="int8", max_abs=1e6)
    assert refused(rebuilt(data, values=loud), limited) == "value_too_large"
    with_norm = plan(encoding="int8", max_norm=1.0)
    assert refused(data, with_norm) == "norm_too_large"


def test_frames_that_are_no_streams():
    mask, _ = large("int8", 0)
    delta = np.zeros(LARGE, np.float32)
    data = coded(mask=mask, delta=delta)
    expected = plan(encoding="int8", **OPEN)
    lengths = np.frombuffer(section(data, "lengths"), dtype="<u4")
    values = section(data, "values")

    def first_plane(piece: bytes) -> bytes:
        tail = values[64 + int(lengths[0]) :]
        return rebuilt(
            data, lengths=lengths_of(len(piece), *lengths[1:]), values=values[:64] + piece + tail
        )

    def stream(plain: bytes, level: int = 9) -> bytes:
        packer = zlib.compressobj(level, zlib.DEFLATED, -15)
        return packer.compress(plain) + packer.flush()

    assert wire.decode_update(first_plane(stream(bytes(BLOCK))), expected).values.sum() == 0
    for piece in (
        stream(bytes(50_000_000)),
        stream(bytes(BLOCK - 1)),
        stream(bytes(BLOCK + 1)),
        stream(bytes(BLOCK)) + b"\0",
        stream(bytes(BLOCK)) * 2,
        stream(bytes(BLOCK))[:-1],
        zlib.compress(bytes(BLOCK)),
        b"\xff" * 500,
        b"\0",
    ):
        assert refused(first_plane(piece), expected) == "frame_invalid"


def test_coded_masks_that_cannot_be_read():
    data = coded()
    coded_mask = section(data, "mask")
    kind, length = struct.unpack("<BI", coded_mask[:5])
    body = coded_mask[5:]
    assert (kind, length, body) == (0, 3, MASK.to_bytes())

    def chunk(kind: int, body: bytes, length: int | None = None) -> bytes:
        head = struct.pack("<BI", kind, len(body) if length is None else length)
        return rebuilt(data, mask=head + body)

    for bad in (
        chunk(0, body + b"\0"),
        chunk(0, body[:-1]),
        chunk(0, body, length=2),
        chunk(0, body, length=2**32 - 1),
        chunk(1, body),
        chunk(8, body),
        chunk(255, body),
        chunk(2, b""),
        rebuilt(data, mask=b""),
        rebuilt(data, mask=coded_mask[:4]),
    ):
        assert refused(bad) in {"mask_coding_invalid", "mask_size", "mask_missing"}
    padded = bytes([body[0], body[1], body[2] | 0x80])
    assert refused(chunk(0, padded)) == "mask_padding"
    assert refused(chunk(4, body)) == "mask_missing"
    assert refused(rebuilt(data, mask=coded_mask + bytes(6))) == "mask_size"
    changed = bytes([body[0] | 2, body[1], body[2]])
    assert refused(chunk(0, changed)) == "block_rank_invalid"


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "cut", "add"]), st.integers(0, 5000), st.binary(max_size=3)
    ),
    min_size=1,
    max_size=3,
)


@FUZZ
@given(st.sampled_from(DELTA_ENCODINGS), st.booleans(), EDITS, st.integers(1, 200))
def test_a_mutated_file_is_refused_or_says_one_thing(encoding, send_mask, edits, step):
    data = bytearray(coded(encoding, send_mask=send_mask))
    for kind, place, piece in edits:
        at = place % max(len(data), 1)
        if kind == "cut":
            del data[at : at + len(piece)]
        elif kind == "add":
            data[at:at] = piece
        elif data:
            data[at] = data[at] ^ (1 << place % 8) if kind == "flip" else place % 256
    expected = (plan if send_mask else known)(encoding=encoding)
    try:
        found = wire.decode_update(bytes(data), expected)
    except WireError as error:
        code = error.code
    else:
        code = None
    if code is not None:
        with pytest.raises(WireError) as caught:
            in_pieces(bytes(data), expected, step)
        assert caught.value.code == code
        return
    facts = in_pieces(bytes(data), expected, step)
    assert (facts.mask, facts.mask_sent) == (found.mask, found.mask_sent)
    again = wire.encode_delta(found.meta, found.codes, mask=found.mask, send_mask=send_mask)
    assert wire.decode_update(again, expected).values.tobytes() == found.values.tobytes()
