"""What may be summed before a round closes, and how a stored sum is told to be another one's."""

from __future__ import annotations

import numpy as np
import pytest

from fedselect import folding
from fedselect.kernels import Sums
from fedselect.manifestdocs import GROUP, ManifestUpdate
from workers.folding import pack, unpack


@pytest.mark.parametrize(
    ("accepted", "elements", "goal", "due"),
    [
        (0, 1000, 100, False),
        (GROUP - 1, 1000, 100, False),
        (GROUP, 1000, 100, True),
        (GROUP, 999, 100, False),  # too little to be worth a file
        (GROUP + 1, 1000, 100, False),
        (5 * GROUP, 1000, 100, True),
        (GROUP, 50_000, 2, True),
    ],
)
def test_a_complete_group_of_a_large_round_is_folded(accepted, elements, goal, due):
    assert folding.due(accepted, elements=elements, goal=goal, at_least=100_000) is due


def test_at_least_nothing_means_always():
    assert folding.due(GROUP, elements=1, goal=1, at_least=0)
    assert [folding.whole_groups(n) for n in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


def updates(count: int, **changes) -> list[ManifestUpdate]:
    found = [
        ManifestUpdate(
            number=n,
            client=f"c{n}",
            object=f"o{n}",
            sha256=f"{n:064x}",
            mask_object=f"m{n}",
            mask_sha256=f"{n % 3:064x}",
            examples=n,
            weight=1,
        )
        for n in range(1, count + 1)
    ]
    found[2] = found[2].model_copy(update=changes)
    return found


PLACE = {"shard": 1024, "part": 1}


def test_a_sum_fits_every_round_that_begins_with_its_updates():
    digest = folding.prefix_digest(updates(16), 1, **PLACE)
    for count in (8, 9, 16, 20):
        assert folding.fits(digest, 1, updates(count), **PLACE)
    assert not folding.fits(digest, 1, updates(7), **PLACE)


@pytest.mark.parametrize("change", [{"sha256": "f" * 64}, {"mask_sha256": "f" * 64}, {"weight": 2}])
def test_another_file_mask_or_weight_does_not_fit(change):
    digest = folding.prefix_digest(updates(16), 2, **PLACE)
    assert not folding.fits(digest, 2, updates(16, **change), **PLACE)


def test_another_order_place_or_length_does_not_fit():
    digest = folding.prefix_digest(updates(16), 2, **PLACE)
    swapped = updates(16)
    swapped[7], swapped[8] = swapped[8], swapped[7]
    without = [u for u in updates(17) if u.number != 3]  # withdrawn
    assert not folding.fits(digest, 2, swapped, **PLACE)
    assert not folding.fits(digest, 2, without, **PLACE)
    assert not folding.fits(digest, 1, updates(16), **PLACE)
    assert not folding.fits(digest, 2, updates(16), shard=1024, part=2)
    assert not folding.fits(digest, 2, updates(16), shard=2048, part=1)


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [8, 255, 256, 65_535, 65_536])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_stored_sum_comes_back_bit_by_bit(most, weighted):
    rng = np.random.default_rng(most)
    counts = rng.integers(0, most, 37, endpoint=True).astype(np.int32)
    counts[0] = most
    sums = Sums(rng.normal(size=37), counts, rng.normal(size=37) if weighted else None)
    sums.total[1] = -0.0
    found = unpack(pack(sums, most=most), 37, most=most)
    assert found is not None
    found.check()
    assert found.total.tobytes() == sums.total.tobytes()
    assert found.counts.tobytes() == sums.counts.tobytes()
    assert (found.weights is None) is not weighted
    if found.weights is not None and sums.weights is not None:
        assert found.weights.tobytes() == sums.weights.tobytes()


def test_a_file_of_another_length_is_no_sum():
    data = pack(Sums.zeros(37), most=8)
    assert unpack(data[:-1], 37, most=8) is None
    assert unpack(data + b"x", 37, most=8) is None
    assert unpack(b"", 37, most=8) is None
    assert unpack(data, 36, most=8) is None
