"""Differences of versions, piece by piece, against plain numpy on the whole."""

from __future__ import annotations

import numpy as np
import pytest

from fedselect.comparing import Comparison
from fedselect.errors import WireError
from fedselect.space import Kind, ParameterSpace, Role

SPACE = ParameterSpace.of(
    [
        ("a.weight", (30, 11), Kind.WEIGHT, Role.SELECTABLE),
        ("none", (0,), Kind.WEIGHT, Role.SELECTABLE),
        ("a.bias", (30,), Kind.BIAS, Role.SHARED),
        ("zero", (5,), Kind.BIAS, Role.SHARED),
        ("b.weight", (7, 13), Kind.WEIGHT, Role.SELECTABLE),
        ("end", (0,), Kind.WEIGHT, Role.SELECTABLE),
    ]
)


def two(seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(SPACE.dim).astype("<f4")
    other = base.copy()
    other[rng.random(SPACE.dim) < 0.4] += np.float32(0.01)
    zero = SPACE.by_name["zero"]
    base[zero.offset : zero.stop] = other[zero.offset : zero.stop] = 0
    return base, other


@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_every_figure_in_pieces_of_any_size(piece):
    base, other = two()
    found = Comparison(SPACE)
    for start in range(0, SPACE.dim, piece):
        found.add(*(part[start : start + piece].tobytes() for part in (base, other)))
    assert found.position == SPACE.dim
    changes = {change.name: change for change in found.tensors()}
    assert set(changes) == set(SPACE.by_name)
    for slot in SPACE.slots:
        one, two_ = (v[slot.offset : slot.stop].astype(float) for v in (base, other))
        change, step = changes[slot.name], two_ - one
        assert (change.elements, change.changed) == (slot.size, np.count_nonzero(step))
        assert change.l2 == pytest.approx(np.linalg.norm(step))
        assert change.largest == pytest.approx(np.abs(step).max(initial=0))
        if slot.name in {"zero", "none", "end"}:
            assert (change.cosine, change.relative) == (None, None)
        else:
            angle = one @ two_ / np.linalg.norm(one) / np.linalg.norm(two_)
            assert change.cosine == pytest.approx(angle)
            assert change.relative == pytest.approx(np.linalg.norm(step) / np.linalg.norm(one))
    lengths = [change.l2 for change in found.tensors()]
    assert lengths == sorted(lengths, reverse=True)
    total = found.total()
    assert total.elements == SPACE.dim
    assert total.l2 == pytest.approx(np.linalg.norm(other.astype(float) - base))


def test_equal_versions():
    base, _ = two()
    found = Comparison(SPACE)
    found.add(base.tobytes(), base.tobytes())
    total = found.total()
    assert (total.changed, total.l2, total.largest, total.relative) == (0, 0, 0, 0)
    assert total.cosine == pytest.approx(1)


def test_pieces_that_do_not_fit():
    found = Comparison(SPACE)
    for wrong in ((b"\0" * 8, b"\0" * 4), (b"\0" * 4 * (SPACE.dim + 1),) * 2):
        with pytest.raises(WireError):
            found.add(*wrong)
