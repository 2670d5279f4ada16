"""Every way in which an update or version file can be wrong, with the code of its refusal."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from wire_samples import (
    DIM,
    LOWER,
    MASK,
    SPACE,
    THETA,
    UPPER,
    known,
    mask_of,
    plan,
    put_together,
    take_apart,
    update,
)

from fedselect import wire
from fedselect.errors import WireError
from fedselect.masks import Mask


def refused(data: bytes, expected: wire.UpdatePlan | None = None) -> str:
    """The code with which an update is refused."""
    with pytest.raises(WireError) as caught:
        wire.decode_update(data, expected or plan())
    return caught.value.code


# --- what is refused: the file does not fit its assignment -------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"space": "cd" * 32}, "space_mismatch"),
        ({"run": "another"}, "run_mismatch"),
        ({"round": 4}, "round_mismatch"),
        ({"assignment": "another"}, "assignment_mismatch"),
        ({"base_version": "cd" * 32}, "base_version_mismatch"),
        ({"encoding": "bf16"}, "encoding_unknown"),
        ({"mask_version": 2}, "mask_version_mismatch"),
        ({"mask_version": 0}, "mask_version_mismatch"),
        ({"examples": 0}, "header_invalid"),
        ({"examples": -1}, "header_invalid"),
        ({"examples": wire.MAX_EXAMPLES + 1}, "header_invalid"),
        ({"examples": "01"}, "header_invalid"),
        ({"examples": "1.0"}, "header_invalid"),
        ({"examples": "١٢"}, "header_invalid"),
        ({"examples": " 1"}, "header_invalid"),
        ({"examples": ""}, "header_invalid"),
        ({"round": "9" * 100}, "header_invalid"),
        ({"run": "x" * 129}, "header_invalid"),
    ],
)
def test_metadata_that_does_not_fit(change, code):
    assert refused(update(**change)) == code


def test_a_mask_left_out_must_be_known():
    data = update(send_mask=False)
    assert refused(data) == "mask_missing"
    assert refused(data, known(version=2)) == "mask_version_mismatch"
    assert refused(update(send_mask=False, mask_version=2), known()) == "mask_version_mismatch"
    assert refused(update(), known()) == "mask_version_mismatch"
    layout = wire.read_update_layout(data)
    with pytest.raises(WireError, match="must carry its mask"):
        wire.check_update_mask(layout, plan(), sent=None)


def test_a_mask_outside_the_policy():
    personal_marked_shared = Mask.from_bool(MASK.to_bool() & ~LOWER.to_bool())
    assert refused(update(mask=personal_marked_shared)) == "mask_not_allowed"
    shared_turned_personal = mask_of(6)
    assert refused(update(mask=shared_turned_personal)) == "mask_not_allowed"
    fixed = plan(lower=UPPER, upper=UPPER)
    assert refused(update(), fixed) == "mask_not_allowed"
    assert wire.decode_update(update(mask=UPPER), fixed).mask == UPPER


# --- what is refused: the bytes ----------------------------------------------------------------


@pytest.mark.parametrize("data", [update(), update(send_mask=False)], ids=["mask", "no-mask"])
def test_every_truncation_is_refused(data):
    expected = plan() if len(data) == len(update()) else known()
    assert wire.decode_update(data, expected)
    for length in range(len(data)):
        assert refused(data[:length], expected) == "file_truncated"


def test_every_truncated_version_is_refused():
    data = wire.encode_version(SPACE.digest, THETA)
    for length in range(len(data)):
        with pytest.raises(WireError) as caught:
            wire.decode_version(data[:length], space_digest=SPACE.digest, dim=DIM)
        assert caught.value.code == "file_truncated"


@pytest.mark.parametrize("tail", [b"\0", b"PK\x03\x04", update()])
def test_trailing_bytes_are_refused(tail):
    assert refused(update() + tail) == "file_trailing"


def test_an_oversize_header_is_refused_from_eight_bytes():
    for length in (wire.HEADER_CAP + 1, 99_000_000, 2**63, 2**64 - 1):
        with pytest.raises(WireError) as caught:
            wire.header_size(struct.pack("<Q", length))
        assert caught.value.code == "header_oversize"
    assert wire.header_size(struct.pack("<Q", wire.HEADER_CAP)) == wire.HEADER_CAP + 8
    padded = json.dumps(take_apart(update())[0]).encode().ljust(wire.HEADER_CAP + 1)
    assert refused(put_together(padded, b"")) == "header_oversize"


def test_values_must_match_the_shared_bits():
    header, payload = take_apart(update())
    more = b"".join((payload[:16], THETA[~MASK.to_bool()].tobytes(), bytes(4), MASK.to_bytes()))
    header["values"] |= {"shape": [14], "data_offsets": [16, 72]}
    header["mask"]["data_offsets"] = [72, 75]
    assert refused(put_together(header, more)) == "values_length"
    fewer = mask_of(0, 4, 10)
    header, payload = take_apart(update())
    smuggled = payload[:-3] + fewer.to_bytes()
    assert refused(put_together(header, smuggled)) == "values_length"


def test_more_values_than_elements():
    header, payload = take_apart(update(send_mask=False))
    header["values"] |= {"shape": [DIM + 1], "data_offsets": [16, 16 + 4 * (DIM + 1)]}
    data = put_together(header, payload[:16] + bytes(4 * (DIM + 1)))
    assert refused(data, known()) == "values_length"


@pytest.mark.parametrize("bit", range(DIM, 24))
def test_a_padding_bit_is_refused(bit):
    data = bytearray(update())
    data[-3 + bit // 8] |= 1 << bit % 8
    assert refused(bytes(data)) == "mask_padding"


def test_a_mask_of_another_size():
    header, payload = take_apart(update())
    header["mask"] |= {"shape": [4], "data_offsets": [68, 72]}
    assert refused(put_together(header, payload + b"\0")) == "mask_size"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad):
    theta = THETA.copy()
    theta[5] = bad
    with pytest.raises(WireError) as caught:
        update(theta=theta)
    assert caught.value.code == "values_not_finite"
    with pytest.raises(WireError) as caught:
        wire.encode_version(SPACE.digest, theta)
    assert caught.value.code == "values_not_finite"
    header, payload = take_apart(update())
    data = put_together(header, payload[:16] + np.float32(bad).tobytes() + payload[20:])
    assert refused(data) == "values_not_finite"
    version = wire.version_head(SPACE.digest, DIM) + theta.tobytes()
    with pytest.raises(WireError, match="value 5 "):
        wire.decode_version(version, space_digest=SPACE.digest, dim=DIM)


def test_a_personal_value_that_is_not_finite_does_not_matter():
    theta = THETA.copy()
    theta[0] = np.nan
    assert wire.decode_update(update(theta=theta), plan()).values.size == MASK.shared


@pytest.mark.parametrize("ranks", [[0, 12], [1, 13], [0, 14], [13, 0]])
def test_a_rank_that_does_not_follow_from_the_mask(ranks):
    header, payload = take_apart(update())
    data = put_together(header, struct.pack("<2Q", *ranks) + payload[16:])
    assert refused(data) == "block_rank_invalid"


def test_a_rank_of_another_length():
    header, payload = take_apart(update())
    header["block_rank"] |= {"shape": [3], "data_offsets": [0, 24]}
    header["values"]["data_offsets"] = [24, 76]
    header["mask"]["data_offsets"] = [76, 79]
    data = put_together(header, payload[:16] + bytes(8) + payload[16:])
    assert refused(data) == "block_rank_invalid"


def test_a_version_of_another_space_or_size():
    data = wire.encode_version(SPACE.digest, THETA)
    for space, dim, code in (
        ("cd" * 32, DIM, "space_mismatch"),
        (SPACE.digest, DIM + 1, "values_length"),
        (SPACE.digest, DIM - 1, "values_length"),
    ):
        with pytest.raises(WireError) as caught:
            wire.decode_version(data, space_digest=space, dim=dim)
        assert caught.value.code == code


def test_one_format_is_not_the_other():
    assert refused(wire.encode_version(SPACE.digest, THETA)) == "format_unknown"
    with pytest.raises(WireError) as caught:
        wire.decode_version(update(), space_digest=SPACE.digest, dim=DIM)
    assert caught.value.code == "format_unknown"


# --- what is refused: the header ---------------------------------------------------------------


def edited(**changes) -> bytes:
    """A valid update whose header has other fields in some entries (None removes the entry)."""
    header, payload = take_apart(update())
    for name, change in changes.items():
        if change is None:
            del header[name]
        else:
            header[name] = {**header.get(name, {}), **change}
    return put_together(header, payload)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"extra": {"dtype": "U8", "shape": [0], "data_offsets": [71, 71]}}, "tensor_unexpected"),
        ({"../../etc/passwd": {"dtype": "U8"}}, "tensor_unexpected"),
        ({"values": None}, "tensor_missing"),
        ({"block_rank": None}, "tensor_missing"),
        ({"__metadata__": None}, "header_invalid"),
        ({"__metadata__": {"extra": "1"}}, "header_invalid"),
        ({"__metadata__": {"run": 5}}, "header_invalid"),
        ({"__metadata__": {"format": "fedselect-update/3"}}, "format_unknown"),
        ({"__metadata__": {"format": ["x"]}}, "format_unknown"),
        ({"values": {"dtype": "F64"}}, "header_invalid"),
        ({"values": {"dtype": "I32"}}, "header_invalid"),
        ({"values": {"dtype": 7}}, "header_invalid"),
        ({"mask": {"dtype": "BOOL"}}, "header_invalid"),
        ({"values": {"more": 1}}, "header_invalid"),
        ({"values": {"shape": [13, 1]}}, "header_invalid"),
        ({"values": {"shape": []}}, "header_invalid"),
        ({"values": {"shape": 13}}, "header_invalid"),
        ({"values": {"shape": [13.0]}}, "header_invalid"),
        ({"values": {"shape": [True]}}, "header_invalid"),
        ({"values": {"shape": ["13"]}}, "header_invalid"),
        ({"values": {"shape": [-13]}}, "header_invalid"),
        ({"values": {"shape": [2**40]}}, "header_invalid"),
        ({"values": {"shape": [2**64 + 13]}}, "header_invalid"),
        ({"values": {"shape": [None]}}, "header_invalid"),
        ({"values": {"data_offsets": [16]}}, "header_invalid"),
        ({"values": {"data_offsets": [16, 68, 68]}}, "header_invalid"),
        ({"values": {"data_offsets": [15, 67]}}, "header_invalid"),
        ({"values": {"data_offsets": [17, 69]}}, "header_invalid"),
        ({"values": {"data_offsets": [68, 16]}}, "header_invalid"),
        ({"values": {"data_offsets": [16.0, 68]}}, "header_invalid"),
        ({"mask": {"data_offsets": [69, 72]}}, "header_invalid"),
        ({"mask": {"data_offsets": [67, 70]}}, "header_invalid"),
        ({"mask": {"data_offsets": [0, 3]}}, "header_invalid"),
        ({"block_rank": {"data_offsets": [8, 24]}}, "header_invalid"),
    ],
)
def test_the_schema_is_closed(changes, code):
    assert refused(edited(**changes)) == code


@pytest.mark.parametrize("field", wire.UPDATE_FIELDS)
def test_every_metadata_field_is_needed(field):
    header, payload = take_apart(update())
    del header["__metadata__"][field]
    assert refused(put_together(header, payload)) == "header_invalid"


def test_a_tensor_that_is_no_object():
    header, payload = take_apart(update())
    for value in (None, 5, "x", [], [1, 2]):
        assert refused(put_together(header | {"values": value}, payload)) == "header_invalid"
    assert refused(put_together(header | {"__metadata__": []}, payload)) == "header_invalid"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{}{}",
        b'{"a":1',
        b"\xff\xfe{}",
        b'{"\xc3\x28":1}',
        b"\xef\xbb\xbf{}",
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"__metadata__":{"a":' + b"9" * 5000 + b"}}",
        b'{"values":{},"values":{}}',
        b'{"__metadata__":{"run":"1","run":"1"}}',
        b'{"values":{"dtype":"F32","dtype":"F32"}}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_headers_that_are_not_the_right_json(text):
    assert refused(put_together(text, b"")) == "header_invalid"


def test_a_key_given_twice_in_a_valid_file():
    header, payload = take_apart(update())
    text = json.dumps(header, separators=(",", ":"))
    entry = json.dumps(header["mask"], separators=(",", ":"))
    for twice in (
        text[:-1] + f',"mask":{entry}}}',
        text.replace('"run":', '"run":"x","run":', 1),
        text.replace('"dtype":"U8"', '"dtype":"U8","dtype":"U8"', 1),
    ):
        assert refused(put_together(twice.encode(), payload)) == "header_invalid"


@pytest.mark.parametrize("place", ["metadata", "format", "dtype", "shape", "entry"])
def test_no_depth_of_nesting_gets_past_the_header(place):
    header, payload = take_apart(update())
    text = json.dumps(header, separators=(",", ":")).encode()
    old = {
        "metadata": json.dumps(header["__metadata__"], separators=(",", ":")).encode(),
        "format": b'"fedselect-update/1"',
        "dtype": b'"F32"',
        "shape": b"[13]",
        "entry": json.dumps(header["values"], separators=(",", ":")).encode(),
    }[place]
    for depth in (*range(1, 60), *range(900, 1010), 5000):
        nested = text.replace(old, b"[" * depth + b"]" * depth, 1)
        expected = {"header_invalid", "format_unknown"}
        assert refused(put_together(nested, payload)) in expected


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace(b",", b", ", 1),
        lambda text: text.rstrip(b" ") + b" " * (8 - len(text.rstrip(b" ")) % 8) + b" " * 8,
        lambda text: text.rstrip(b" ") + b"\t" * (-len(text.rstrip(b" ")) % 8),
        lambda text: b" " + text[:-1],
        lambda text: text.replace(b"f32", b"f3\\u0032", 1),
        lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode(),
        lambda text: json.dumps(json.loads(text)).encode(),
    ],
)
def test_one_content_has_one_spelling(rewrite):
    data = update()
    size = wire.header_size(data)
    assert data[size - 1 : size] == b" "
    assert refused(put_together(rewrite(data[8:size]), data[size:])) == "header_invalid"
