"""Link classes: how fast a client's line is, from a word or from rates.

Owns the spelling of a link and the table of named classes, whose rates are assumptions. Must not
know what travels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedselect.errors import SettingsError

_RATE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)([kmg])bit")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
ROUND_TRIP = 0.05  # seconds, where only rates are given


@dataclass(frozen=True, slots=True)
class Link:
    """Bits a second in both directions, and seconds of a round trip."""

    name: str
    down: float
    up: float
    round_trip: float = ROUND_TRIP


# Typical of what such lines give, not promised by anybody; name the rates if you know them.
CLASSES = {
    link.name: link
    for link in (
        Link("lan", 1e9, 1e9, 0.001),
        Link("fibre", 250e6, 100e6, 0.015),
        Link("cable", 100e6, 20e6, 0.025),
        Link("dsl", 25e6, 5e6, 0.035),
        Link("4g", 20e6, 8e6, 0.06),
        Link("3g", 3e6, 1e6, 0.15),
        Link("satellite", 20e6, 3e6, 0.6),
    )
}


def link(text: str) -> Link:
    """The link that ``10mbit``, ``50mbit/10mbit`` (down/up) or the name of a class stands for.

    Raises:
        SettingsError: link_unknown.
    """
    if text in CLASSES:
        return CLASSES[text]
    down, slash, up = text.partition("/")
    rates = [_rate(part) for part in ((down, up) if slash else (down, down))]
    if None in rates or not all(rates):
        raise SettingsError(
            f"{text!r} is no link; write 10mbit, 50mbit/10mbit (down/up) or one of "
            f"{', '.join(CLASSES)}",
            code="link_unknown",
        )
    return Link(text, *(rate for rate in rates if rate))


def _rate(text: str) -> float | None:
    found = _RATE.fullmatch(text)
    return float(found[1]) * _UNITS[found[2]] if found else None
