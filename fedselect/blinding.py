"""Blinding: a round whose coordinator learns the sum of the updates and no single one of them.

Owns the protocol of Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation") against a
coordinator that is curious but follows it: what each participant sends in four steps, and how the
sum comes out. A prototype, used by ``simulate`` alone (docs/SECURE-AGGREGATION.md). Must not know
files, rounds or the network; randomness is handed in. Secret shares are ``shamir``.

A vector is cut into *units* (rows or tensors). Which units a participant sends is public, so that
blinding is needed only where two participants send the same. Values are fixed point in whole
numbers modulo 2^32, in which blinds cancel exactly. Of every pair the lower number adds a stream
that the higher one subtracts; besides, everybody adds a stream of its own. After the values have
come, survivors reveal shares: of the own seeds of those who delivered, of the pair keys of those
who did not, and never both of one participant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedselect.errors import BlindingError
from fedselect.shamir import SHARE, combine, split

Draw = Callable[[int], bytes]  # so many bytes from the operating system's generator
Ring = npt.NDArray[np.uint32]
Values = npt.NDArray[np.float64]
KEY = 32  # bytes of a secret
LARGEST = 2**31 - 1  # magnitude of a sum, in steps
DOMAIN = b"fedselect-blinding/1 "


@dataclass(frozen=True, slots=True)
class Terms:
    """What everybody agrees on before a round.

    ``context`` names the round and nothing else, ``units`` are the elements of each unit,
    ``threshold`` participants recover a secret, ``least`` of them must deliver a unit, ``bound`` is
    the largest magnitude of a value.
    """

    context: bytes
    units: tuple[int, ...]
    threshold: int
    least: int
    bound: float

    def step(self, participants: int) -> float:
        """Of fixed point: as fine as the sum of so many participants allows."""
        return self.bound / (LARGEST // participants)


class Hello(NamedTuple):
    """First step: two fresh public keys, and which units will be sent."""

    number: int
    sealing: bytes
    pairing: bytes
    units: frozenset[int]


class Reveal(NamedTuple):
    """Fourth step: shares of the own seeds of survivors and of the pair keys of the others."""

    number: int
    seeds: Mapping[int, bytes]
    keys: Mapping[int, bytes]


class Roster:
    """Everybody's first step, as the coordinator hands it round.

    Raises:
        BlindingError: fewer than the threshold; a threshold that a coordinator could reach twice by
            telling two halves different things; numbers or units that are not possible.
    """

    def __init__(self, terms: Terms, hellos: Iterable[Hello]) -> None:
        self.terms = terms
        self.of = {hello.number: hello for hello in hellos}
        size = len(self.of)
        if not size // 2 < terms.threshold <= size:
            raise BlindingError(
                f"a threshold of {terms.threshold} of {size}: it must be more than half, and there"
            )
        if any(not 0 < number <= size for number in self.of):
            raise BlindingError(f"participants are numbered 1 to {size}")
        known = frozenset(range(len(terms.units)))
        if any(not hello.units <= known for hello in self.of.values()):
            raise BlindingError("a participant names units that do not exist")
        self.step = terms.step(size)

    def sent(self, number: int) -> list[int]:
        """The units that a participant sends: those that enough others send, too."""
        own = self.of[number].units
        return [unit for unit in sorted(own) if self.sharers(unit) >= self.terms.least]

    def sharers(self, unit: int, among: Iterable[int] | None = None) -> int:
        """How many participants send a unit."""
        numbers = self.of if among is None else among
        return sum(unit in self.of[number].units for number in numbers)

    def common(self, one: int, other: int) -> list[int]:
        """The units that both send."""
        return [unit for unit in self.sent(one) if unit in self.of[other].units]

    def size(self, units: Iterable[int]) -> int:
        """Elements of these units."""
        return sum(self.terms.units[unit] for unit in units)

    def check_survivors(self, survivors: frozenset[int]) -> None:
        """Refuse to unblind a sum of too few.

        Raises:
            BlindingError: fewer survivors than the threshold, or than a unit needs.
        """
        if not survivors <= self.of.keys() or len(survivors) < self.terms.threshold:
            raise BlindingError(
                f"{len(survivors)} of {len(self.of)} delivered, {self.terms.threshold} are needed"
            )
        for unit in range(len(self.terms.units)):
            sent = self.sharers(unit) >= self.terms.least
            if sent and self.sharers(unit, survivors) < self.terms.least:
                raise BlindingError(
                    f"unit {unit} was delivered by fewer than {self.terms.least}: its sum would "
                    "say too much of them"
                )


# --- a participant -----------------------------------------------------------------------------


class _Step(IntEnum):
    HELLO, SHARES, VALUES, REVEAL, DONE = range(5)


@dataclass
class Participant:
    """One client in one round; a further round needs another, with fresh keys.

    ``values`` maps each unit that it shares to its elements (n,), float64.
    """

    number: int
    terms: Terms
    values: Mapping[int, Values] = field(repr=False)
    draw: Draw = field(repr=False)

    def __post_init__(self) -> None:
        self._sealing, self._pairing, self._seed = (self.draw(KEY) for _ in range(3))
        self._next = _Step.HELLO
        self._roster: Roster | None = None
        self._held: dict[int, tuple[bytes, bytes]] = {}

    def hello(self) -> Hello:
        """First step."""
        self._go(_Step.HELLO)
        keys = _public(self._sealing), _public(self._pairing)
        return Hello(self.number, *keys, frozenset(self.values))

    def shares(self, roster: Roster) -> dict[int, bytes]:
        """Second step: for every other participant a sealed share of both secrets.

        Raises:
            BlindingError: the roster is of other terms, or does not have this participant as it is.
        """
        self._go(_Step.SHARES)
        mine = roster.of.get(self.number)
        if roster.terms != self.terms or mine is None or mine.pairing != _public(self._pairing):
            raise BlindingError("the roster is not of this round")
        self._roster = roster
        seeds, keys = (
            split(secret, len(roster.of), self.terms.threshold, self.draw)
            for secret in (self._seed, self._pairing)
        )
        self._held[self.number] = seeds[self.number], keys[self.number]
        return {
            other: self._seal(other, seeds[other] + keys[other])
            for other in roster.of
            if other != self.number
        }

    def blinded(self, sealed: Mapping[int, bytes]) -> Ring:
        """Third step: the values, which are noise to everybody; ``sealed`` are others' shares.

        Who has sent no shares takes no part; blinds are of those who have.

        Raises:
            BlindingError: too few shares, a share that is not for this participant, a value beyond
                the bound.
        """
        self._go(_Step.VALUES)
        roster = self._known()
        for other, data in sealed.items():
            opened = self._open(other, data)
            self._held[other] = opened[:SHARE], opened[SHARE:]
        if len(self._held) < self.terms.threshold:
            raise BlindingError(f"only {len(self._held)} participants have sent their shares")
        units = roster.sent(self.number)
        found = np.concatenate([self._fixed(unit) for unit in units] or [np.zeros(0, np.uint32)])
        found += _stream(self._seed, roster.size(units))
        for other in self._held:
            if other != self.number:
                key = _pair_key(self._pairing, roster.of[other].pairing, self.terms.context)
                _add_pair(found, roster, (self.number, other), key, _sign(self.number, other))
        return found

    def reveal(self, survivors: frozenset[int]) -> Reveal:
        """Fourth step, once: shares that unblind the sum of the survivors, and nothing else.

        Raises:
            BlindingError: too few survivors, or this participant was asked before.
        """
        self._go(_Step.REVEAL)
        if self.number not in survivors:
            raise BlindingError("who has not delivered is not asked")
        self._known().check_survivors(survivors)
        return Reveal(
            self.number,
            {other: held[0] for other, held in self._held.items() if other in survivors},
            {other: held[1] for other, held in self._held.items() if other not in survivors},
        )

    def _go(self, step: _Step) -> None:
        if self._next is not step:
            raise BlindingError(f"step {step.name.lower()} is asked for once, and in order")
        self._next = _Step(step + 1)

    def _known(self) -> Roster:
        if self._roster is None:
            raise BlindingError("there is no roster yet")
        return self._roster

    def _fixed(self, unit: int) -> Ring:
        values = np.asarray(self.values[unit], dtype=np.float64)
        if values.shape != (self.terms.units[unit],):
            raise BlindingError(f"unit {unit} has {self.terms.units[unit]} elements")
        if not np.all(np.abs(values) <= self.terms.bound):
            raise BlindingError(f"a value is beyond the bound of {self.terms.bound:g}")
        return np.rint(values / self._known().step).astype(np.int64).astype(np.uint32)

    def _seal(self, other: int, data: bytes) -> bytes:
        key = self._sealing_key(other, self.number)
        return ChaCha20Poly1305(key).encrypt(bytes(12), data, None)  # the key serves once

    def _open(self, other: int, data: bytes) -> bytes:
        if other == self.number or other not in self._known().of:
            raise BlindingError(f"there is no other participant {other}")
        try:
            key = self._sealing_key(other, other)
            opened = ChaCha20Poly1305(key).decrypt(bytes(12), data, None)
        except InvalidTag as error:
            raise BlindingError(f"the shares of participant {other} were tampered with") from error
        if len(opened) != 2 * SHARE:
            raise BlindingError(f"the shares of participant {other} have a wrong length")
        return opened

    def _sealing_key(self, other: int, sender: int) -> bytes:
        """Of the direction: nobody seals two things with one key."""
        theirs = self._known().of[other].sealing
        return _agreed(self._sealing, theirs, b"seal %d " % sender + self.terms.context)


# --- the coordinator ---------------------------------------------------------------------------


class Unblinded(NamedTuple):
    """The sums of a round: per unit the total (n,) and how many participants are in it."""

    totals: dict[int, Values]
    sharers: dict[int, int]


def unblind(roster: Roster, blinded: Mapping[int, Ring], reveals: Sequence[Reveal]) -> Unblinded:
    """The sum over all who delivered; ``blinded`` are their values by number.

    Participants that have sent shares but no values are those that the reveals have keys of.

    Raises:
        BlindingError: too few reveals, or they do not fit; a reconstructed key that is not the
            announced one.
    """
    survivors = frozenset(blinded)
    roster.check_survivors(survivors)
    gone = frozenset(number for each in reveals for number in each.keys) - survivors
    need = roster.terms.threshold
    streams: dict[int, Ring] = {}
    for number in survivors:
        shares = {each.number: each.seeds[number] for each in reveals if number in each.seeds}
        found = blinded[number].copy()
        if found.shape != (roster.size(roster.sent(number)),):
            raise BlindingError(f"participant {number} has sent another number of values")
        found -= _stream(combine(shares, need), found.size)
        streams[number] = found
    for number in gone:
        shares = {each.number: each.keys[number] for each in reveals if number in each.keys}
        secret = combine(shares, need)
        if _public(secret) != roster.of[number].pairing:
            raise BlindingError(f"the shares of participant {number} do not give its key")
        for other in survivors:
            key = _pair_key(secret, roster.of[other].pairing, roster.terms.context)
            _add_pair(streams[other], roster, (other, number), key, -_sign(other, number))
    return _summed(roster, streams)


def _summed(roster: Roster, streams: Mapping[int, Ring]) -> Unblinded:
    totals = {
        unit: np.zeros(size, np.uint32)
        for unit, size in enumerate(roster.terms.units)
        if roster.sharers(unit) >= roster.terms.least
    }
    for number, stream in streams.items():
        start = 0
        for unit in roster.sent(number):
            stop = start + roster.terms.units[unit]
            totals[unit] += stream[start:stop]
            start = stop
    return Unblinded(
        {
            unit: total.view(np.int32).astype(np.float64) * roster.step
            for unit, total in totals.items()
        },
        {unit: roster.sharers(unit, streams) for unit in totals},
    )


# --- the whole round ---------------------------------------------------------------------------


class Lost(NamedTuple):
    """Who drops out after which step."""

    hello: frozenset[int] = frozenset()
    shares: frozenset[int] = frozenset()
    values: frozenset[int] = frozenset()


NOBODY = Lost()


def rehearse(
    terms: Terms, values: Mapping[int, Mapping[int, Values]], draw: Draw, lost: Lost = NOBODY
) -> Unblinded:
    """A round in one process, with real keys; ``values`` are those of participants 1 to n.

    Raises:
        BlindingError: too many are lost, or as any of the steps.
    """
    everybody = {n: Participant(n, terms, units, draw) for n, units in sorted(values.items())}
    roster = Roster(terms, [each.hello() for each in everybody.values()])
    there = {n: each for n, each in everybody.items() if n not in lost.hello}
    sealed = {n: each.shares(roster) for n, each in there.items()}
    there = {n: each for n, each in there.items() if n not in lost.shares}
    blinded = {
        n: each.blinded({other: s[n] for other, s in sealed.items() if other != n})
        for n, each in there.items()
    }
    survivors = frozenset(blinded)
    reveals = [each.reveal(survivors) for n, each in there.items() if n not in lost.values]
    return unblind(roster, blinded, reveals)


# --- streams -----------------------------------------------------------------------------------


def _sign(one: int, other: int) -> int:
    """Of a pair's stream in the values of the first."""
    return 1 if one < other else -1


def _add_pair(found: Ring, roster: Roster, pair: tuple[int, int], key: bytes, sign: int) -> None:
    """Add the stream of a pair, with this sign, to the values of the first of it."""
    owner, other = pair
    common = set(roster.common(owner, other))
    stream = _stream(key, roster.size(common))
    if sign < 0:
        stream = np.negative(stream)
    place = taken = 0
    for unit in roster.sent(owner):
        size = roster.terms.units[unit]
        if unit in common:
            found[place : place + size] += stream[taken : taken + size]
            taken += size
        place += size


def _stream(key: bytes, size: int) -> Ring:
    """So many uniform numbers; a key serves for one stream alone."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32)


def _pair_key(secret: bytes, public: bytes, context: bytes) -> bytes:
    return _agreed(secret, public, b"pair " + context)


def _agreed(secret: bytes, public: bytes, info: bytes) -> bytes:
    try:
        shared = X25519PrivateKey.from_private_bytes(secret).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise BlindingError("a public key is none") from error
    return HKDF(SHA256(), KEY, salt=None, info=DOMAIN + info).derive(shared)


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
