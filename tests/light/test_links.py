"""Links are read as people write them."""

from __future__ import annotations

import pytest

from fedselect.errors import SettingsError
from fedselect.links import CLASSES, ROUND_TRIP, link


def test_rates_and_classes():
    assert (link("10mbit").down, link("10mbit").up) == (10e6, 10e6)
    found = link("1.5gbit/250kbit")
    assert (found.down, found.up, found.round_trip) == (1.5e9, 250e3, ROUND_TRIP)
    for name in CLASSES:
        assert link(name).name == name


@pytest.mark.parametrize(
    "text", ["", "10", "mbit", "0mbit", "10mbit/", "/1mbit", "10MBit", "1e9kbit"]
)
def test_what_is_no_link_is_refused(text):
    with pytest.raises(SettingsError) as caught:
        link(text)
    assert caught.value.code == "link_unknown"
