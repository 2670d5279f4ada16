"""What a client serves: the version its channel names with the personal part that goes with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

import fedselect
from fedselect import agentdocs, shelf, wire
from fedselect.agentdocs import ArmRecord, Committed, StoredFile
from fedselect.errors import FedSelectError
from fedselect.personal import derive_seed
from fedselect.serving import Personalized
from fedselect.shelf import read_shown
from fedselect.space import FloatVector

from .fake_coordinator import SPACE, TinyLearner, known_id, problem
from .fake_site import NAME, Killed, Life, Live, O, sites
from .test_agent_crashes import Axe, assert_same_files, survive, watched

__all__ = ["watched"]


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with sites(monkeypatch) as make:
        yield make


def there_and_back(published: int) -> int | None:
    """Version 1, then the candidate 2, then back."""
    return {0: None, 1: 1, 2: 2}.get(published, 1)


def served(life: Life) -> Personalized:
    return fedselect.load_personalized(life.path)


def flat(found: Personalized) -> FloatVector:
    return SPACE.flatten({n: found.tensors[n] for n in (slot.name for slot in SPACE.slots)})


def decoded(life: Life, number: int) -> FloatVector:
    return wire.decode_version(life.other.files[number], space_digest=SPACE.digest, dim=SPACE.dim)


def test_a_rollback_switches_both_halves_at_once(live: Live) -> None:
    life, shown = live(rounds=4, channel=there_and_back), []

    def look(where: str) -> None:
        if where == "before POST /v1/check-ins" and read_shown(life.path).pairs:
            shown.append(served(life))

    life.cut = look
    life.run()
    assert life.outcomes().count(O.SERVING) == 3
    turns = [
        shown[0],
        *(b for a, b in itertools.pairwise(shown) if a.version != b.version),
    ]
    first, candidate, back = turns
    digests = [wire.file_digest(life.other.files[n]) for n in (1, 2, 1)]
    assert [each.version for each in turns] == digests
    assert [each.channel for each in turns] == ["stable"] * 3
    # Each with the part that counted when it was first served, though training has gone on.
    assert [each.participations for each in turns] == [1, 2, 1]
    np.testing.assert_array_equal(flat(first), flat(back))
    assert (flat(candidate) != flat(first)).any()
    assert life.state().participations == 4
    assert first.tensors["batches"] == 1


def test_both_halves_are_what_was_merged(live: Live) -> None:
    life = live(rounds=2, channel=lambda published: 2 if published == 2 else None)
    life.run()
    np.testing.assert_array_equal(flat(served(life)), life.state().merge(decoded(life, 2)))
    assert served(life).arm == known_id("arm")
    # Named, an arm is as it was last trained.
    named = fedselect.load_personalized(life.path, arm=known_id("arm"))
    assert named.version is None
    np.testing.assert_array_equal(flat(named), life.state().theta)


def test_a_newcomer_personalizes_before_it_serves_and_tells_nobody(live: Live) -> None:
    life = live(rounds=1, channel=lambda _: 0)
    life.run(steps=1)
    assert life.steps[-1].outcome is O.SERVING
    assert not life.arm.joinpath("arm.json").exists() or life.record().committed is None
    settings, base = life.other.settings, decoded(life, 0)
    seed = derive_seed(settings, NAME, 0)
    alone = TinyLearner().participate(None, base, settings=settings, seed=seed).state
    np.testing.assert_array_equal(flat(served(life)), alone.merge(base))
    assert (served(life).participations, served(life).round) == (1, 0)
    assert not [r for r in life.other.seen if r.method == "PUT"]
    life.run()
    assert life.record().participations == 1, "it takes part as if it had never served"
    assert served(life).participations == 1, "the pair stays as it was"


def test_a_newcomer_is_judged_by_what_it_serves(live: Live) -> None:
    life = live(rounds=0, channel=lambda _: 0)
    seen: list[Any] = []
    evaluate = life.learner.evaluate

    def remember(state: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(state)
        return evaluate(state, *args, **kwargs)

    life.learner.evaluate = remember  # type: ignore[method-assign]
    life.run()
    assert [state.participations for state in seen] == [1]
    np.testing.assert_array_equal(seen[0].merge(decoded(life, 0)), flat(served(life)))


def test_in_a_rollout_both_versions_are_scored_as_they_are_served(live: Live) -> None:
    life = live(rounds=2, compared=1, channel=lambda published: published or None)
    shown = {}

    def look(where: str) -> None:
        if where == "before POST /v1/check-ins" and read_shown(life.path).pairs:
            found = served(life)
            shown[found.version] = flat(found)

    life.cut = look
    life.run()
    report = life.other.evaluation
    assert report is not None
    assert set(report.scores) == {"post", "before"}, "no baseline is trained for that"
    for name, number in (("post", 2), ("before", 1)):
        vector = shown[wire.file_digest(life.other.files[number])]
        assert report.scores[name].loss == pytest.approx(float(np.abs(vector).sum()))


def test_a_version_that_was_never_served_is_compared_as_it_would_be(live: Live) -> None:
    life = live(rounds=1, compared=0, channel=lambda published: 1 if published else None)
    life.run()
    report = life.other.evaluation
    assert report is not None
    settings, base = life.other.settings, decoded(life, 0)
    seed = derive_seed(settings, NAME, 0)  # it had nothing of its own at version 0
    alone = TinyLearner().participate(None, base, settings=settings, seed=seed).state
    merged = alone.personalized(base)
    assert report.scores["before"].loss == pytest.approx(float(np.abs(merged).sum()))
    assert [pair.number for pair in read_shown(life.path).pairs] == [1]


def test_what_cannot_be_served_leaves_everything_as_it_was(live: Live) -> None:
    life = live(rounds=2, channel=lambda published: 1 if published else None)
    other = life.other._serving

    def strange(number: int | None) -> Any:
        found = other(number)
        return found and found.model_copy(update={"settings": {"of_a_later_release": 1}})

    life.other._serving = strange  # type: ignore[method-assign]
    life.run()
    assert life.outcomes().count(O.SERVING) == 1, "its own part is enough, no settings are needed"
    newcomer = live(rounds=2, channel=lambda _: 0)
    other = newcomer.other._serving
    newcomer.other._serving = strange  # type: ignore[method-assign]
    newcomer.run()
    told = [step.detail for step in newcomer.steps if "install a newer fedselect" in step.detail]
    assert len(told) == 1, "said once, not tried again and again"
    assert newcomer.other.published == [1, 2], "and it goes on training"
    assert served(newcomer).channel is None


def test_another_model_is_refused_in_words_and_nothing_else_is_held_back(live: Live) -> None:
    life = live(rounds=1, channel=lambda _: 0)
    own = life.other._serving

    def foreign(number: int | None) -> Any:
        found = own(number)
        return found and found.model_copy(update={"space_digest": "0" * 64})

    life.other._serving = foreign  # type: ignore[method-assign]
    life.run()
    assert O.SERVING not in life.outcomes()
    (said,) = [step.detail for step in life.steps if "is not served" in step.detail]
    assert "parameter space 000000000000…" in said
    assert life.other.published == [1]


def test_a_channel_of_a_later_release_is_followed(live: Live) -> None:
    life = live(rounds=1, channel=lambda published: 1 if published else None)
    own = life.other._serving

    def later(number: int | None) -> Any:
        found = own(number)
        return found and found.model_copy(update={"channel": "canary"})

    life.other._serving = later  # type: ignore[method-assign]
    life.run()
    assert served(life).channel == "canary"


def at_once(live: Live, number: int, rounds: int) -> FloatVector:
    """A version as it is served by who is told of it as soon as it is there."""
    life = live(rounds=rounds, channel=lambda published: number if published == number else None)
    life.run()
    return flat(served(life))


@pytest.mark.parametrize(
    ("rounds", "pins", "own"),
    [
        (5, (), 2),  # it is still remembered
        (9, (), 6),  # it is not any more: the oldest that is
        (9, (2,), 2),  # the coordinator said early enough that it may be wanted
    ],
)
def test_a_version_is_served_with_the_part_of_its_own_round(
    live: Live, rounds: int, pins: tuple[int, ...], own: int
) -> None:
    channel, late = {rounds: 2}.get, {"rounds": rounds}
    life = live(**late, channel=channel, pins=lambda published: pins if published > 1 else ())
    life.run()
    assert life.state().participations == rounds
    assert (served(life).participations, served(life).round) == (own, own)
    if own == 2:
        np.testing.assert_array_equal(flat(served(life)), at_once(live, 2, rounds))


def test_states_that_counted_do_not_pile_up(live: Live) -> None:
    life = live(rounds=9, pins=lambda published: [2] if 1 < published < 8 else [])
    kept = []

    def look(where: str) -> None:
        if where == "before POST /v1/check-ins" and life.record().tentative is None:
            record = life.record()
            kept.append([each.round for each in record.earlier])
            names = {path.name for path in life.arm.glob("*.safetensors")}
            assert names == {each.state.name for each in (*record.earlier, *record.work())}

    life.cut = look
    life.run()
    assert kept[-1] == [8, 7, 6]
    assert [6, 5, 4, 2] in kept, "the pinned one stays"
    assert max(map(len, kept)) == agentdocs.HISTORY + 1


def test_who_came_later_had_nothing_of_an_earlier_version() -> None:
    def done(number: int) -> Committed:
        file = StoredFile(name=f"{number}.safetensors", sha256="0" * 64, size=1)
        return Committed(assignment=known_id(f"{number}"), round=number, state=file)

    record = ArmRecord()
    for number in (3, 5):
        record = record.followed_by(done(number))
        record = record.model_copy(update={"participations": record.participations + 1})
    assert [record.at(n) for n in range(7)] == [None] * 3 + [done(3)] * 2 + [done(5)] * 2
    # An earlier release did not note when it began; version 0 is nobody's own.
    old = ArmRecord(participations=9, committed=done(7))
    assert [old.at(n) for n in (0, 1, 9)] == [None, done(7), done(7)]


def test_a_version_that_cannot_be_fetched_holds_nothing_back(live: Live) -> None:
    life = live(rounds=12, channel=lambda published: 1 if published > 3 else None)
    fetch, asked = life.other._download, []

    def away(number: int) -> httpx.Response:
        if number == 1 and 3 < len(life.other.published) < 6:
            asked.append(len(life.other.published))
            return problem(503, "storage_away")
        return fetch(number)

    life.other._download = away  # type: ignore[method-assign]
    life.run()
    assert life.other.published == list(range(1, 13))
    assert life.outcomes().count(O.TRAINED) == 12
    told = [step for step in life.steps if "version 1 of stable is not served" in step.detail]
    assert told[0].outcome is O.TRAINED, "the very step trains"
    assert asked[0] == 4
    assert len(told) > 1, "and it is tried again"
    assert served(life).version == wire.file_digest(life.other.files[1])


def test_an_evaluation_of_what_is_gone_is_declined(live: Live) -> None:
    life = live(rounds=3, compared=1)
    fetch = life.other._download

    def gone(number: int) -> httpx.Response:
        late = len(life.other.published) == 3  # before, it was the base of a round
        return problem(410, "object_deleted") if number == 1 and late else fetch(number)

    life.other._download = gone  # type: ignore[method-assign]
    life.run()
    assert life.outcomes()[-2:] == [O.DECLINED, O.FINISHED]
    assert life.other.evaluation is None


def test_old_pairs_do_not_pile_up_and_a_damaged_one_is_made_again(live: Live) -> None:
    life = live(rounds=6, channel=lambda published: published)
    life.run()
    kept = read_shown(life.path).pairs
    assert [pair.number for pair in kept] == [6, 5, 4]
    names = {path.name for path in (life.path / shelf.FOLDER).iterdir()}
    files = {file.name for pair in kept for file in (pair.version, pair.state)}
    assert names == files | {shelf.RECORD}
    (life.path / shelf.FOLDER / kept[1].state.name).write_bytes(b"torn")
    assert served(life).version == kept[0].version.sha256
    (life.path / shelf.FOLDER / kept[0].version.name).write_bytes(b"torn")
    with pytest.raises(FedSelectError, match="damaged") as caught:
        served(life)
    assert caught.value.code == "state_corrupt"


def test_a_crash_at_every_boundary_serves_the_old_or_the_new(
    live: Live, watched: list[Axe]
) -> None:
    """From the first version, personalized for serving alone, to the next one and back."""
    story = {"rounds": 2, "channel": {0: 0, 1: 1, 2: 0}.get}
    whole, counting = live(**story), Axe()
    survive(whole, counting, watched)
    assert whole.outcomes().count(O.SERVING) == 3
    right = {}
    for number in (0, 1):
        partial = live(rounds=1, channel=lambda p, n=number: n if p == n else None)
        partial.run()
        right[wire.file_digest(whole.other.files[number])] = flat(served(partial))
    for at in range(1, counting.count + 1):
        life = live(**story)
        axe = Looking(life, right, at)
        survive(life, axe, watched)
        assert_same_files(life, whole, axe.last)
        assert axe.seen == set(right)


class Looking(Axe):
    """Kills at a boundary, and looks at what is served after every write and removal."""

    def __init__(self, life: Life, right: dict[str, FloatVector], *at: int) -> None:
        super().__init__(*at)
        self.life, self.right, self.seen = life, right, set[str]()

    def __call__(self, where: str) -> None:
        of_files = where.startswith(("half", "after writing", "after removing"))
        if of_files and read_shown(self.life.path).pairs:
            found = served(self.life)
            np.testing.assert_array_equal(flat(found), self.right[str(found.version)], where)
            self.seen.add(str(found.version))
        super().__call__(where)


def test_a_death_in_the_middle_of_personalizing_gives_the_same_part(live: Live) -> None:
    whole, life = (live(rounds=1, channel=lambda _: 0) for _ in range(2))
    whole.run()

    def kill() -> None:
        if life.learner.trained == 1:
            raise Killed

    life.learner.fault = kill
    with pytest.raises(Killed):
        life.run()
    assert not read_shown(life.path).pairs
    life.run()
    np.testing.assert_array_equal(flat(served(life)), flat(served(whole)))
