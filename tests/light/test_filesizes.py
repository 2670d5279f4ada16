"""Estimated sizes against files that the real writers wrote."""

from __future__ import annotations

import numpy as np
import pytest

from fedselect import wire
from fedselect.deltafiles import step
from fedselect.deltas import DELTA_ENCODINGS, quantise
from fedselect.filesizes import (
    Coding,
    UpdateFacts,
    delta_size,
    entropy,
    update_size,
    value_bytes,
    version_size,
)
from fedselect.masks import Mask

DIMS = [19, 5_000, 65_536, 300_001]
META = {
    "space": "5" * 64,
    "run": "0198f5a0-0000-7000-8000-000000000001",
    "assignment": "0198f5a0-0000-7000-8000-000000000002",
    "base_version": "ab" * 32,
    "round": 12,
    "examples": 345,
}


def meta(**changes):
    return wire.UpdateMeta(**{**META, "mask_version": 1, **changes})


def draw(dim, share, seed=0):
    return Mask.from_bool(np.random.default_rng(seed).random(dim) < share)


def facts(drawn, **changes):
    numbers = {"round": 12, "examples": 345, "mask": True, **changes}
    return UpdateFacts(drawn.dim, drawn.personal, **numbers)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("share", [0, 0.3, 1])
@pytest.mark.parametrize("sent", [True, False])
def test_a_file_of_values_is_known_to_the_byte(dim, share, sent):
    mask, theta = draw(dim, share), np.ones(dim, np.float32)
    file = wire.encode_update(meta(), theta, mask=mask, send_mask=sent)
    assert update_size(facts(mask, mask=sent), "f32") == len(file)


@pytest.mark.parametrize("dim", DIMS)
def test_a_version_is_known_to_the_byte(dim):
    assert version_size(dim) == len(wire.encode_version("5" * 64, np.zeros(dim, np.float32)))


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
@pytest.mark.parametrize("dim", DIMS[1:])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
@pytest.mark.parametrize("grown", [None, 0.05])
def test_normal_deltas_weigh_what_is_said(encoding, dim, share, grown):
    mask = draw(dim, share)
    known, number = None, 1
    if grown is not None:
        known, number = mask, 3
        mask = mask | draw(dim, grown, seed=1)
    delta = np.random.default_rng(2).standard_normal(dim, dtype=np.float32)
    codes = quantise(delta, encoding, mask)
    described = meta(encoding=encoding, mask_version=number)
    file = wire.encode_delta(described, codes, mask=mask, send_mask=True, known=known)
    new = mask.personal - known.personal if known else 0
    found = update_size(facts(mask, grown=new, masks_sent=number), encoding)
    assert found == pytest.approx(len(file), rel=0.02)


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
@pytest.mark.parametrize("still", [0, 0.2, 0.9])
@pytest.mark.parametrize("dim", DIMS[1:])
def test_a_delta_file_weighs_what_is_said(encoding, still, dim):
    rng = np.random.default_rng(3)
    mean = rng.standard_normal(dim, dtype=np.float32) * np.float32(1e-3)
    mean[rng.random(dim) < still] = 0
    version = wire.encode_version("5" * 64, np.zeros(dim, np.float32))
    _, file = step(version, mean, space="5" * 64, encoding=encoding)
    assert delta_size(dim, encoding, still=still) == pytest.approx(len(file), rel=0.03)


@pytest.mark.parametrize("encoding", DELTA_ENCODINGS)
def test_what_was_measured_counts(encoding):
    bare = facts(draw(70_000, 0.5), mask=False)
    one, two = (update_size(bare, encoding, Coding(up=up)) for up in (0.5, 1.5))
    assert two - one == pytest.approx(bare.shared, abs=8)
    small, large = (delta_size(70_000, encoding, still=0, coding=Coding(down=d)) for d in (0.5, 1))
    assert large - small == pytest.approx(35_000, abs=8)


def test_nothing_shared_weighs_nothing():
    assert value_bytes(UpdateFacts(100, 100, mask=False), "int8", Coding()) == 0
    assert entropy(100, 0) == entropy(100, 100) == 0
    assert entropy(8000, 4000) == 1000
