"""Bytes and seconds as people read them.

Owns their spelling alone.
"""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"


def duration(seconds: float) -> str:
    """A duration for people."""
    for limit, unit, scale in ((1, "ms", 1e-3), (120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds / 3600:,.1f} h"
