"""Forms of an answer: which of those that there are a caller would like best.

Owns the reading of ``Accept`` (RFC 9110 §12.5.1). Must not know what is answered.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 1000  # characters of the header that are read


def preferred(accept: str | None, offered: Sequence[str]) -> str:
    """The offered media type of the highest weight; the first one among equals, or of none.

    A caller who accepts nothing that there is gets the first: an answer is better than a refusal.
    """
    weights = dict(map(_weighed, (accept or "*/*")[:LONGEST].split(",")))
    return max(offered, key=lambda form: _weight(weights, form))


def _weighed(part: str) -> tuple[str, float]:
    form, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return form, min(1.0, max(0.0, float(value)))
            except ValueError:
                return form, 0.0
    return form, 1.0


def _weight(weights: dict[str, float], form: str) -> float:
    family = f"{form.partition('/')[0]}/*"
    return next((weights[each] for each in (form, family, "*/*") if each in weights), 0.0)
