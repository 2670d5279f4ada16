"""The smallest download, whatever the client holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedselect.downloads import LONGEST_CHAIN, DeltaFacts, cheapest

FULL = 1000


def line(*sizes: int) -> list[DeltaFacts]:
    """Versions v0, v1 …, each reached by a delta of the given size; newest first."""
    found = [DeltaFacts(f"v{n}", f"v{n + 1}", size) for n, size in enumerate(sizes)]
    return found[::-1]


def ask(deltas: list[DeltaFacts], *held: str) -> list[str] | None:
    found = cheapest(deltas, target=deltas[0].result, size=FULL, held=held)
    return None if found is None else [delta.result for delta in found]


def test_who_holds_it_fetches_nothing():
    assert ask(line(10, 10), "v2") == []
    assert cheapest([], target="v0", size=FULL, held=["v0"]) == []


def test_who_holds_nothing_of_use_fetches_the_whole_file():
    assert ask(line(10, 10)) is None
    assert ask(line(10, 10), "other") is None
    assert cheapest([], target="v0", size=FULL, held=["other"]) is None


def test_deltas_come_in_the_order_in_which_they_are_applied():
    assert ask(line(10, 20, 30), "v1") == ["v2", "v3"]


def test_it_starts_from_the_newest_version_held():
    assert ask(line(10, 20, 30), "v0", "v2") == ["v3"]


def test_a_chain_that_is_no_smaller_than_the_file_is_not_taken():
    assert ask(line(500, 499), "v0") == ["v1", "v2"]
    assert ask(line(500, 500), "v0") is None


def test_a_gap_ends_the_chain():
    first, _, third = line(10, 10, 10)[::-1]
    assert ask([third, first], "v0") is None
    assert ask([third, first], "v2") == ["v3"]


def test_a_chain_has_a_longest_length():
    assert ask(line(*[1] * LONGEST_CHAIN), "v0") is not None
    assert ask(line(*[1] * (LONGEST_CHAIN + 1)), "v0") is None


def test_a_version_that_changed_nothing_does_not_lead_in_circles():
    same = [DeltaFacts("v1", "v1", 5), DeltaFacts("v0", "v1", 5)]
    assert ask(same, "v1") == []
    assert ask(same, "v0") == ["v1", "v1"]


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=20),
    st.sets(st.integers(0, 20)),
)
def test_no_other_choice_is_smaller(sizes, numbers):
    deltas, held = line(*sizes), {f"v{n}" for n in numbers}
    found = cheapest(deltas, target=f"v{len(sizes)}", size=FULL, held=held)
    cost = FULL if found is None else sum(delta.size for delta in found)
    choices = [
        sum(sizes[n:]) for n in range(len(sizes) + 1) if f"v{n}" in held and len(sizes) - n <= 16
    ]
    assert cost == min([FULL, *choices])
