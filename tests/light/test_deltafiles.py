"""Steps from version to version, and the files that carry them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from wire_samples import GOLDEN

from fedselect import wire
from fedselect.deltafiles import (
    DeltaMeta,
    advance,
    apply,
    check_delta_head,
    delta_head,
    patch,
    step,
)
from fedselect.deltas import DELTA_ENCODINGS, quantise
from fedselect.errors import WireError
from fedselect.layout import header_size, read_step_layout
from fedselect.masks import BLOCK

SPACE, DIM = "5" * 64, 2 * BLOCK + 4099


@pytest.fixture(params=DELTA_ENCODINGS)
def encoding(request):
    return request.param


def vectors(seed=0, dim=DIM):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim).astype(np.float32)
    mean = (rng.standard_normal(dim) * 1e-3 * (rng.random(dim) < 0.7)).astype(np.float32)
    return base, mean


def files(encoding, seed=0):
    base, mean = vectors(seed)
    version = wire.encode_version(SPACE, base)
    return version, *step(version, mean, space=SPACE, encoding=encoding)


def code_of(call, *arguments, **more) -> str:
    with pytest.raises(WireError) as caught:
        call(*arguments, **more)
    return caught.value.code


def test_a_version_is_its_base_and_the_decoded_mean_number_by_number(encoding):
    base, mean = vectors()
    codes = quantise(mean, encoding)
    values = apply(base, codes)
    decoded = codes.values()
    for j in [0, 1, 4095, 4096, BLOCK, DIM - 1, *range(100, 200)]:
        assert values[j] == np.float32(float(base[j]) + float(decoded[j]))
    np.testing.assert_array_equal(values, advance(base, mean, encoding)[0])


def test_what_has_no_mean_keeps_its_value(encoding):
    base, mean = vectors()
    values, _, _ = advance(base, mean, encoding)
    np.testing.assert_array_equal(values[mean == 0], base[mean == 0])
    assert (values != base)[mean != 0].mean() > 0.5


def test_shards_one_behind_the_other_are_the_whole(encoding):
    base, mean = vectors()
    whole = advance(base, mean, encoding)
    parts = [
        advance(base[start : start + BLOCK], mean[start : start + BLOCK], encoding)
        for start in range(0, DIM, BLOCK)
    ]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), whole[0])
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), whole[1])
    assert b"".join(p[2] for p in parts) == whole[2]


def test_who_applies_the_delta_holds_the_very_version(encoding):
    version, result, delta = files(encoding)
    assert patch(version, delta, space=SPACE, dim=DIM) == result
    assert len(delta) < len(result) / 2


def test_a_delta_file_says_where_it_leads_from_and_to(encoding):
    version, result, delta = files(encoding)
    meta = check_delta_head(read_step_layout(delta[: header_size(delta)]), space=SPACE, dim=DIM)
    digests = wire.file_digest(version), wire.file_digest(result)
    assert meta == DeltaMeta(SPACE, *digests, encoding, DIM)


def test_the_same_step_gives_the_same_bytes(encoding):
    assert files(encoding) == files(encoding)


def test_what_does_not_fit_is_refused(encoding):
    version, _, delta = files(encoding)
    other = wire.encode_version(SPACE, vectors(1)[0])
    assert code_of(patch, other, delta, space=SPACE, dim=DIM) == "base_version_mismatch"
    assert code_of(patch, version, delta, space="6" * 64, dim=DIM) == "space_mismatch"
    assert code_of(patch, version, delta, space=SPACE, dim=DIM - 1) == "values_length"
    assert code_of(patch, version, delta[:-1], space=SPACE, dim=DIM) == "file_truncated"
    assert code_of(patch, version, delta + b"x", space=SPACE, dim=DIM) == "file_trailing"
    assert code_of(patch, version, version, space=SPACE, dim=DIM) == "format_unknown"


def test_a_delta_that_leads_elsewhere_is_refused(encoding):
    version, _, delta = files(encoding)
    base, mean = vectors()
    _, lengths, frames = advance(base, mean, encoding)
    meta = DeltaMeta(SPACE, wire.file_digest(version), "7" * 64, encoding, DIM)
    wrong = delta_head(meta, lengths, len(frames)) + frames
    assert code_of(patch, version, wrong, space=SPACE, dim=DIM) == "delta_mismatch"
    unknown = delta.replace(f'"{encoding}"'.encode(), b'"f64x"'[: len(encoding) + 2])
    assert code_of(patch, version, unknown, space=SPACE, dim=DIM) == "encoding_unknown"


def test_no_damage_goes_unnoticed(encoding):
    version, result, delta = files(encoding)
    rng = np.random.default_rng(2)
    for at in rng.integers(0, len(delta), size=60):
        damaged = bytearray(delta)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            assert patch(version, bytes(damaged), space=SPACE, dim=DIM) == result
        except WireError:
            continue


def test_a_version_must_stay_finite(encoding):
    base, mean = vectors(dim=10)
    base[3] = mean[3] = np.float32(3.3e38)
    assert code_of(advance, base, mean, encoding) == "values_not_finite"


# --- golden files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["delta-bf16", "delta-int8"])
def test_golden_steps(name):
    """No zlib can change these: so few codes are never coded."""
    delta = (GOLDEN / f"{name}.safetensors").read_bytes()
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    mean = np.array(expected["mean"], dtype=np.float32)
    space, encoding = expected["metadata"]["space"], expected["metadata"]["encoding"]
    start = wire.encode_version(space, np.array(expected["base"], dtype=np.float32))
    result = wire.encode_version(space, np.array(expected["result"], dtype=np.float32))
    assert step(start, mean, space=space, encoding=encoding) == (result, delta)
    assert patch(start, delta, space=space, dim=mean.size) == result
    layout = read_step_layout(delta[: header_size(delta)])
    assert dict(layout.metadata) == expected["metadata"]
