"""What was personalized: masks of many clients over many rounds, compared on their packed bytes.

Owns the figures about masks. Comparisons leave out what is personal or frozen by its role: it is so
in every mask, whatever the policy chose. Must not read files or know whose masks they may see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean
from uuid import UUID

from fedselect.masks import Mask
from fedselect.reportdoc import ClientMasks, Join, Overlap, TensorReport
from fedselect.space import ParameterSpace, Role, Slot

MOST_TENSORS = 200  # of one report: the largest
MOST_COMPARED = 40  # clients of the overlap matrix: all pairs are compared


@dataclass(frozen=True, slots=True)
class Stage:
    """The mask of one update: its round, its personal elements and the digest of its bytes."""

    round: int
    personal: int
    digest: str


@dataclass(frozen=True, slots=True)
class History:
    """A client's masks, oldest first; there is at least one."""

    client_id: UUID
    name: str
    stages: Sequence[Stage]


def wanted(histories: Sequence[History], *, besides: Sequence[str] = ()) -> list[str]:
    """The digests to read, the most telling first: every client's last mask, those ``besides``,
    then older ones.
    """
    lines = [list(dict.fromkeys(s.digest for s in reversed(h.stages))) for h in histories]
    lines += [[digest] for digest in besides]
    depth = max(map(len, lines), default=0)
    order = (line[back] for back in range(depth) for line in lines if back < len(line))
    return list(dict.fromkeys(order))


def personal_percent(space: ParameterSpace, personal: int) -> float:
    """Of the elements that could be personal or shared, as ``Mask.share``."""
    frozen = space.count(Role.FROZEN)
    return 100 * (personal - frozen) / (space.dim - frozen)


class Masks:
    """The masks that were read, by digest, without what no policy chooses."""

    def __init__(self, space: ParameterSpace, read: Mapping[str, Mask]) -> None:
        self.space = space
        self._read = read
        self._always = Mask.initial(space)

    def over_time(self, history: History) -> ClientMasks:
        """A client's masks, each compared with the one before."""
        stages = history.stages
        steps = [self._kept(a.digest, b.digest) for a, b in pairwise(stages)]
        return ClientMasks(
            client_id=history.client_id,
            name=history.name,
            rounds=[stage.round for stage in stages],
            personal_percent=[personal_percent(self.space, s.personal) for s in stages],
            jaccard=[None, *steps],
        )

    def _kept(self, before: str, now: str) -> float | None:
        """As :meth:`jaccard`; None if nothing was chosen before that could have been kept."""
        earlier = self._chosen(before)
        return self.jaccard(before, now) if earlier is not None and earlier.personal else None

    def jaccard(self, first: str, second: str) -> float | None:
        """|A ∩ B| / |A ∪ B| of what was chosen; None if that is nothing, or was not read."""
        a, b = self._chosen(first), self._chosen(second)
        if a is None or b is None or not (a.personal or b.personal):
            return None
        both = (a & b).personal
        return both / (a.personal + b.personal - both)

    def _chosen(self, digest: str) -> Mask | None:
        found = self._read.get(digest)
        return None if found is None else found - self._always

    def comparable(self, histories: Sequence[History]) -> list[tuple[str, Mask]]:
        """Name and last mask of the clients of whom it was read, at most ``MOST_COMPARED``."""
        last = ((h.name, self._read.get(h.stages[-1].digest)) for h in histories)
        return [(name, mask) for name, mask in last if mask is not None][:MOST_COMPARED]

    def tensors(self, last: Sequence[tuple[str, Mask]]) -> list[TensorReport]:
        """The largest tensors and how much of each is personal, at every client."""
        counts = [mask.per_slot(self.space) for _, mask in last]
        slots = [slot for slot in self.space.slots if slot.size and slot.role is not Role.FROZEN]
        largest = sorted(slots, key=lambda slot: (-slot.size, slot.offset))[:MOST_TENSORS]
        reports = []
        for slot in sorted(largest, key=lambda slot: slot.offset):
            shares = [100 * each[slot.name] / slot.size for each in counts]
            reports.append(
                TensorReport(
                    name=slot.name,
                    role=slot.role.value,
                    elements=slot.size,
                    mean_percent=fmean(shares) if shares else 0.0,
                    clients_percent=shares,
                )
            )
        return reports

    def overlap(self, last: Sequence[tuple[str, Mask]]) -> Overlap:
        """All clients against all, and what blind choice of as many elements would give."""
        chosen = [mask - self._always for _, mask in last]
        counts = [mask.per_slot(self.space) for mask in chosen]
        matrix: list[list[float | None]] = [[None] * len(last) for _ in last]
        blind = []
        for i, mask in enumerate(chosen):
            matrix[i][i] = 1.0 if mask.personal else None
        for i, j in combinations(range(len(last)), 2):
            total = chosen[i].personal + chosen[j].personal
            if not total:
                continue
            both = (chosen[i] & chosen[j]).personal
            matrix[i][j] = matrix[j][i] = both / (total - both)
            met = sum(counts[i][s.name] * counts[j][s.name] / s.size for s in self._sized())
            blind.append(met / (total - met))
        pairs = [matrix[i][j] for i, j in combinations(range(len(last)), 2)]
        found = [value for value in pairs if value is not None]
        return Overlap(
            clients=[name for name, _ in last],
            jaccard=matrix,
            mean=fmean(found) if found else None,
            by_chance=fmean(blind) if blind else None,
            tree=average_linkage(matrix),
        )

    def over_rounds(
        self, histories: Sequence[History], slots: Sequence[str], *, least: int
    ) -> tuple[list[int], dict[str, list[float | None]]]:
        """Rounds, and by tensor its mean personal percent in each, None of fewer than ``least``."""
        counts = {digest: mask.per_slot(self.space) for digest, mask in self._read.items()}
        known: dict[int, list[dict[str, int]]] = {}
        for stage in (stage for history in histories for stage in history.stages):
            found = known.setdefault(stage.round, [])
            found += [counts[stage.digest]] if stage.digest in counts else []
        rounds, sizes = sorted(known), {slot.name: slot.size for slot in self.space.slots}

        def mean(name: str, number: int) -> float | None:
            masks = known[number]
            shares = (100 * each[name] / sizes[name] for each in masks)
            return fmean(shares) if len(masks) >= max(least, 1) else None

        return rounds, {name: [mean(name, number) for number in rounds] for name in slots}

    def again(self, mask: Mask, other: Mask) -> tuple[float, float] | None:
        """Percent of what was chosen that ``other`` chose, too, and what blind choice would give;
        None if nothing was chosen.
        """
        ours, theirs = mask - self._always, other - self._always
        if not ours.personal:
            return None
        one, two = ours.per_slot(self.space), theirs.per_slot(self.space)
        met = sum(one[slot.name] * two[slot.name] / slot.size for slot in self._sized())
        return 100 * (ours & theirs).personal / ours.personal, 100 * met / ours.personal

    def _sized(self) -> list[Slot]:
        return [slot for slot in self.space.slots if slot.size]


def average_linkage(jaccard: Sequence[Sequence[float | None]]) -> list[Join]:
    """Join the two closest clusters until one is left (UPGMA; Sokal and Michener 1958).

    The distance of two clients is 1 − Jaccard, 0 where neither chose anything; that of clusters the
    mean over all pairs between them. Of equal distances the first clients are joined first.
    """
    count = len(jaccard)
    apart = {
        (i, j): 1 - value if (value := jaccard[i][j]) is not None else 0.0
        for i, j in combinations(range(count), 2)
    }
    sizes, joins = dict.fromkeys(range(count), 1), []
    for made in range(count, 2 * count - 1):
        one, other = min(apart, key=lambda pair: (apart[pair], pair))
        joins.append(Join(one=one, other=other, distance=apart.pop((one, other))))
        weights = sizes.pop(one), sizes.pop(other)
        for rest in sizes:
            parts = [apart.pop((min(each, rest), max(each, rest))) for each in (one, other)]
            mean = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
            apart[rest, made] = mean
        sizes[made] = sum(weights)
    return joins
