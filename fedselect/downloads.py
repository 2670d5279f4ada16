"""How a client gets to a version with the fewest bytes: a pure function over sizes and digests.

Owns the choice between nothing, a chain of delta files and the whole file. Must not know rows, the
store or the agent's folder.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

LONGEST_CHAIN = 16  # files; a client that was away for longer gets the whole version


@dataclass(frozen=True, slots=True)
class DeltaFacts:
    """A delta file of ``size`` bytes: applied to the version file ``base`` it gives ``result``.

    Both are SHA-256 digests (hex) of whole version files.
    """

    base: str
    result: str
    size: int


def cheapest(
    newest_first: Sequence[DeltaFacts], *, target: str, size: int, held: Container[str]
) -> list[DeltaFacts] | None:
    """What to fetch for the version ``target``: deltas to apply in this order, or the whole file.

    ``newest_first`` are the deltas that lead to ``target``, one behind the other; ``size`` are the
    bytes of the whole file, ``held`` the digests of the versions that the client has. An empty
    list: nothing, it holds the target. None: the whole file, because no chain of at most 16 deltas
    from a version that it holds is smaller. Of two chains the shorter is always the smaller one.
    """
    chain: list[DeltaFacts] = []
    at, cost = target, 0
    for delta in newest_first[:LONGEST_CHAIN]:
        if at in held or delta.result != at:
            break
        chain.append(delta)
        at, cost = delta.base, cost + delta.size
    if at not in held or (chain and cost >= size):
        return None
    return chain[::-1]
