"""Shamir's secret sharing of 32 bytes over the field of 2^521 − 1, a prime.

Owns splitting and combining. Must not draw randomness of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedselect.errors import BlindingError

PRIME = 2**521 - 1
SHARE = 66  # bytes of a share
SECRET = 32
_DRAWN = SHARE + 16  # so many bytes modulo the prime are uniform but for 2^-128


def split(
    secret: bytes, count: int, threshold: int, draw: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Shares for 1 to ``count``, of which any ``threshold`` give the secret and fewer nothing.

    ``draw`` gives so many bytes of the operating system's generator.

    Raises:
        ValueError: a secret of another length, or a threshold that cannot be.
    """
    if len(secret) != SECRET or not 1 <= threshold <= count:
        raise ValueError(f"{len(secret)} bytes, {threshold} of {count}")
    drawn = (int.from_bytes(draw(_DRAWN), "big") % PRIME for _ in range(threshold - 1))
    coefficients = [int.from_bytes(secret, "big"), *drawn]
    return {at: _at(coefficients, at).to_bytes(SHARE, "big") for at in range(1, count + 1)}


def _at(coefficients: list[int], at: int) -> int:
    found = 0
    for each in reversed(coefficients):
        found = (found * at + each) % PRIME
    return found


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret behind at least ``threshold`` shares, by number; all of them must agree.

    Raises:
        BlindingError: too few shares, or shares that are not of one secret.
    """
    if len(shares) < threshold:
        raise BlindingError(f"{len(shares)} shares of a secret, {threshold} are needed")
    numbers = sorted(shares)
    points = {at: int.from_bytes(shares[at], "big") for at in numbers}
    first = {at: points[at] for at in numbers[:threshold]}
    secret = _through(first, 0)
    agree = all(_through(first, at) == points[at] for at in numbers[threshold:])
    if secret >= 2 ** (8 * SECRET) or not agree:
        raise BlindingError("the shares are not of one secret")
    return secret.to_bytes(SECRET, "big")


def _through(points: Mapping[int, int], at: int) -> int:
    """The value at ``at`` of the polynomial through these points (Lagrange)."""
    found = 0
    for one, value in points.items():
        above = below = 1
        for other in points:
            if other != one:
                above = above * (at - other) % PRIME
                below = below * (one - other) % PRIME
        found = (found + value * above * pow(below, -1, PRIME)) % PRIME
    return found
