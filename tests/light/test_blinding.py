"""Blinding: the sum of a round without any single update, and what is refused."""

import hashlib

import numpy as np
import pytest

from fedselect.blinding import (
    Lost,
    Participant,
    Reveal,
    Roster,
    Terms,
    rehearse,
    unblind,
)
from fedselect.errors import BlindingError
from fedselect.shamir import PRIME, combine, split

CLIENTS = 20
UNITS = (700, 1, 64, 333, 40)


class Draw:
    """Bytes that are the same in every run of a test."""

    def __init__(self, seed=0):
        self.seed, self.count = seed, 0

    def __call__(self, size):
        self.count += 1
        return hashlib.shake_256(f"{self.seed}/{self.count}".encode()).digest(size)


def terms(**changes):
    rule = {"context": b"run/3/1", "units": UNITS, "threshold": 12, "least": 3, "bound": 2.0}
    return Terms(**rule | changes)


def values(clients=CLIENTS, *, units=UNITS):
    """Unit 0 is everybody's, unit 4 that of two clients, the others of some."""
    draw = np.random.default_rng(5)
    has = {0: range(1, clients + 1), 1: range(1, clients + 1, 2), 2: range(3, clients + 1)}
    has |= {3: range(2, clients + 1, 2), 4: (4, 5)}
    return {
        number: {unit: draw.uniform(-2, 2, units[unit]) for unit in has if number in set(has[unit])}
        for number in range(1, clients + 1)
    }


def plain(sent, rule, numbers):
    """The sums in float64, and exactly in whole steps."""
    step = rule.step(len(sent))
    floats, steps, sharers = {}, {}, {}
    for unit in range(4):
        own = [sent[n][unit] for n in numbers if unit in sent[n]]
        floats[unit] = np.sum(own, axis=0)
        steps[unit] = np.sum([np.rint(v / step).astype(np.int64) for v in own], axis=0)
        sharers[unit] = len(own)
    return floats, steps, sharers, step


def test_twenty_clients_of_which_six_drop_out_give_the_exact_sum():
    sent, rule = values(), terms()
    lost = Lost(hello={3, 8}, shares={5, 14}, values={6, 20})
    found = rehearse(rule, sent, Draw(), lost)
    delivered = sorted(set(sent) - lost.hello - lost.shares)
    floats, steps, sharers, step = plain(sent, rule, delivered)
    assert set(found.totals) == {0, 1, 2, 3}  # two clients are too few for a sum of unit 4
    assert found.sharers == sharers
    for unit, total in found.totals.items():
        np.testing.assert_array_equal(np.rint(total / step).astype(np.int64), steps[unit])
        np.testing.assert_allclose(total, steps[unit] * step, rtol=1e-12)
        mean, wanted = total / sharers[unit], floats[unit] / sharers[unit]
        assert np.max(abs(mean - wanted)) <= step / 2 * (1 + 1e-9)
    assert step < 4e-8  # of values up to 2


def test_thirty_percent_lost_at_any_step_leaves_the_sum_of_the_others():
    sent, rule = values(), terms()
    six = frozenset({2, 7, 9, 12, 15, 20})
    for lost in (Lost(hello=six), Lost(shares=six), Lost(values=six)):
        found = rehearse(rule, sent, Draw(), lost)
        delivered = sorted(set(sent) - lost.hello - lost.shares)
        _, steps, _, step = plain(sent, rule, delivered)
        for unit, total in found.totals.items():
            np.testing.assert_array_equal(np.rint(total / step).astype(np.int64), steps[unit])


def test_blinds_of_other_keys_cancel_to_the_same_sum():
    first, second = (rehearse(terms(), values(), Draw(seed)).totals[0] for seed in (1, 2))
    np.testing.assert_array_equal(first, second)


def begun(rule, sent, seed=0):
    """Participants after their second step, the roster, and what they have sealed."""
    people = {n: Participant(n, rule, own, Draw(f"{seed}/{n}")) for n, own in sent.items()}
    roster = Roster(rule, [each.hello() for each in people.values()])
    sealed = {n: each.shares(roster) for n, each in people.items()}
    return people, roster, sealed


def delivered(people, sealed):
    return {
        n: each.blinded({o: s[n] for o, s in sealed.items() if o != n})
        for n, each in people.items()
    }


def test_what_a_client_sends_looks_like_noise():
    rule = terms(units=(20_000,), threshold=3)
    zeros = {n: {0: np.zeros(20_000)} for n in range(1, 5)}
    people, roster, sealed = begun(rule, zeros)
    sent = delivered(people, sealed)
    for own in sent.values():
        counts = np.bincount(own.view(np.uint8), minlength=256)
        chi = np.sum((counts - counts.mean()) ** 2 / counts.mean())
        assert 170 < chi < 360  # 255 degrees of freedom: seven in a million are outside
    some = sum(own for n, own in sent.items() if n != 1)
    assert np.count_nonzero(some == 0) < 5  # blinds of three out of four do not cancel
    everybody = sum(sent.values())
    assert np.count_nonzero(everybody == 0) < 5  # each has its own on top
    reveals = [each.reveal(frozenset(people)) for each in people.values()]
    assert not unblind(roster, sent, reveals).totals[0].any()


def test_nobody_reveals_both_secrets_of_one():
    people, _, sealed = begun(terms(), values())
    delivered(people, sealed)
    survivors = frozenset(range(1, 16))
    found = people[1].reveal(survivors)
    assert found.seeds.keys() == survivors
    assert found.keys.keys() == frozenset(range(16, 21))
    with pytest.raises(BlindingError, match="once, and in order"):
        people[1].reveal(frozenset(people))


@pytest.mark.parametrize("gone", [9, 12])
def test_too_few_survivors_are_not_unblinded(gone):
    lost = Lost(shares=frozenset(range(1, gone + 1)))
    with pytest.raises(BlindingError, match="12 are needed"):
        rehearse(terms(), values(), Draw(), lost)


def test_a_unit_that_too_few_delivered_is_not_unblinded():
    lost = Lost(shares=frozenset({2, 4, 6, 8, 10, 12, 14, 16}))  # of ten with unit 3
    with pytest.raises(BlindingError, match="unit 3 was delivered by fewer than 3"):
        rehearse(terms(), values(), Draw(), lost)


def test_shares_that_were_tampered_with_or_are_anothers_are_refused():
    people, _, sealed = begun(terms(), values())
    mine = {o: s[1] for o, s in sealed.items() if o != 1}
    with pytest.raises(BlindingError, match="tampered"):
        people[1].blinded({**mine, 2: mine[3]})
    people, _, sealed = begun(terms(), values())
    mine = {o: s[1] for o, s in sealed.items() if o != 1}
    with pytest.raises(BlindingError, match="tampered"):
        people[1].blinded({**mine, 2: mine[2][:-1] + bytes([mine[2][-1] ^ 1])})


def test_a_false_share_is_noticed():
    people, roster, sealed = begun(terms(), values())
    sent = delivered(people, sealed)
    survivors = frozenset(sent) - {20}
    del sent[20]
    reveals = [people[n].reveal(survivors) for n in survivors]
    first = reveals[0]
    for wrong in (
        Reveal(first.number, {**first.seeds, 2: bytes(66)}, first.keys),
        Reveal(first.number, first.seeds, {20: bytes(66)}),
    ):
        with pytest.raises(BlindingError, match="not of one secret"):
            unblind(roster, sent, [wrong, *reveals[1:]])
    assert unblind(roster, sent, reveals).sharers[0] == 19


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"threshold": 10}, "more than half"), ({"threshold": 21}, "more than half")],
)
def test_thresholds_that_protect_nobody_are_refused(changes, words):
    with pytest.raises(BlindingError, match=words):
        rehearse(terms(**changes), values(), Draw())


def test_a_value_beyond_the_bound_or_of_another_size_is_refused():
    for changed, words in (
        ([2.001], "beyond the bound"),
        ([float("nan")], "beyond"),
        ([1, 1], "has 1"),
    ):
        sent = values()
        sent[1][1] = np.array(changed, dtype=float)
        with pytest.raises(BlindingError, match=words):
            rehearse(terms(), sent, Draw())


def test_the_largest_sum_does_not_wrap_around():
    sent = {n: {0: np.full(3, 2.0), 1: np.full(3, -2.0)} for n in range(1, CLIENTS + 1)}
    found = rehearse(terms(units=(3, 3)), sent, Draw())
    np.testing.assert_allclose(found.totals[0], 40.0, rtol=1e-6)
    np.testing.assert_allclose(found.totals[1], -40.0, rtol=1e-6)


def test_any_shares_above_the_threshold_give_the_secret_and_fewer_do_not():
    secret = bytes(range(32))
    shares = split(secret, 7, 4, Draw())
    for some in ((1, 2, 3, 4), (7, 5, 3, 1), (2, 4, 6, 7), tuple(range(1, 8))):
        assert combine({n: shares[n] for n in some}, 4) == secret
    with pytest.raises(BlindingError, match="4 are needed"):
        combine({n: shares[n] for n in (1, 2, 3)}, 4)
    assert pow(3, PRIME - 1, PRIME) == 1
    with pytest.raises(ValueError, match="5 of 4"):
        split(secret, 4, 5, Draw())


def test_fewer_shares_fit_every_secret():
    """With three of four points fixed, each secret has a polynomial: they say nothing of it."""
    shares = split(bytes(32), 7, 4, Draw())
    held = {n: int.from_bytes(shares[n], "big") for n in (1, 2, 3)}
    for guess in (0, 1, 2**255):
        points = {0: guess, **held}
        fourth = 0
        for one, value in points.items():
            term = value
            for other in points:
                if other != one:
                    term = term * (4 - other) * pow(one - other, -1, PRIME) % PRIME
            fourth = (fourth + term) % PRIME
        forged = {n: shares[n] for n in (1, 2, 3)} | {4: fourth.to_bytes(66, "big")}
        assert int.from_bytes(combine(forged, 4), "big") == guess
