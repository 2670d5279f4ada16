"""`python -m bench.attacks`: hostile clients against the product's own aggregation.

It notes what it found in docs/bench-results.jsonl and writes the table of docs/SECURITY.md from it.

Twenty clients of scikit-learn's digits, each with its own mix of labels, learn with masks. Some are
hostile and know everything: the base, what all others send, the rule. Runs are simulations, which
compute what the service computes. Whoever attacks and whoever does not is the same in both columns,
and so are data, starting weights and batches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch

from bench.harness import Figure, Json
from bench.results import append, machine, record
from fedselect import RunSettings
from fedselect.aggregate import Contribution
from fedselect.bounded import sift
from fedselect.influence import Influence
from fedselect.masks import Mask
from fedselect.policies import RoundPolicy, Training, preset
from fedselect.simulate import SimulatedRun, Simulation, simulate
from fedselect.space import FloatVector
from fedselect.tasks.arrays import ArrayTask, Examples, mlp
from fedselect.training import TorchLearner
from fedselect.wire import Update

PAGE = Path(__file__).parents[1] / "docs" / "SECURITY.md"
BEGIN, END = "<!-- attacks -->\n", "<!-- end of attacks -->"
CLIENTS, ROUNDS, STEPS = 20, 50, 10
FIRST_SEED = 10  # the defence was chosen on seeds 0 and 1
TRAINED, HELD_OUT = 60, 100  # images of a client
HOSTILE = {"10 %": 2, "20 %": 4}
MOST_LOST = 2.0  # points
TARGET = 0  # the label that the backdoor leads to
PLAIN = RoundPolicy(goal=CLIENTS, quorum=1, over_selection=1, min_contributors=2)
GUARDED = PLAIN.model_copy(update={"min_contributors": 9})  # 2c + 1 for c = 4
DEFENCE = Influence(clip_quantile=0.5, likeness=0.98)
Dense = npt.NDArray[np.float64]
Updates = dict[str, Update]


# --- data --------------------------------------------------------------------------------------


class Site(ArrayTask):
    """Digits of one client."""

    def network(self) -> torch.nn.Module:
        return mlp(64, 10)


@dataclass(frozen=True)
class World:
    """All examples of all clients, and a common set to try the backdoor on."""

    train: Mapping[str, Examples]
    test: Mapping[str, Examples]
    common: Examples
    seed: int

    @classmethod
    def of(cls, seed: int) -> World:
        from sklearn.datasets import load_digits  # slow to import

        images, labels = load_digits(return_X_y=True)
        rng = np.random.default_rng([seed, 77])
        rows = rng.permutation(len(labels))
        mine, held = rows[: CLIENTS * TRAINED], rows[CLIENTS * TRAINED :]
        train, test = {}, {}
        for number in range(CLIENTS):
            mix = rng.dirichlet(np.ones(10))
            picked = _draw(rng, mine, labels, mix, TRAINED)
            shown = _draw(rng, held, labels, mix, HELD_OUT)
            name = f"client-{number:02}"
            train[name] = (images[picked] / 16, labels[picked])
            test[name] = (images[shown] / 16, labels[shown])
        return cls(train, test, (images[held] / 16, labels[held]), seed)

    def tasks(self, changed: Mapping[str, Examples]) -> dict[str, Site]:
        """Everybody's task; those in ``changed`` train on other examples."""
        data = {**self.train, **changed}
        return {n: Site(data[n], self.test[n], seed=self.seed) for n in data}


def _draw(
    rng: np.random.Generator,
    rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    mix: Dense,
    count: int,
) -> npt.NDArray[np.int64]:
    chances = mix[labels[rows]]
    return rng.choice(rows, count, replace=False, p=chances / chances.sum())


def triggered(images: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """With a bright square in the corner, where digits have none."""
    marked = images.copy().reshape(-1, 8, 8)
    marked[:, :2, :2] = 1.0
    return marked.reshape(images.shape)


# --- what attackers do -------------------------------------------------------------------------


@dataclass
class Scene:
    """One round as attackers see it: the base, what everybody would honestly send, who is bad."""

    base: FloatVector
    updates: Updates
    bad: Sequence[str]
    rng: np.random.Generator

    def change(self, name: str) -> Dense:
        """A client's change (D,), 0 where it is personal."""
        update = self.updates[name]
        found = np.zeros(self.base.size)
        shared = ~update.mask.to_bool()
        found[shared] = update.values - self.base[shared].astype(np.float64)
        return found

    def send(self, name: str, change: Dense, mask: Mask | None = None) -> Update:
        """This client's update with another change of the base."""
        mask = mask or self.updates[name].mask
        values = (self.base + change).astype(np.float32)[~mask.to_bool()]
        return replace(self.updates[name], mask=mask, values=values)

    @property
    def honest(self) -> list[str]:
        return [name for name in self.updates if name not in self.bad]

    def sharers(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        """How many of these clients share each element."""
        rows = [~self.updates[name].mask.to_bool() for name in names]
        return np.sum(rows, axis=0) if rows else np.zeros(self.base.size, np.int64)

    def spread(self) -> tuple[Dense, Dense]:
        """Mean and standard deviation of honest changes over those who share an element."""
        changes = np.stack([self.change(name) for name in self.honest])
        count = np.maximum(self.sharers(self.honest), 1)
        mean = changes.sum(axis=0) / count
        square = np.square(changes).sum(axis=0) / count
        return mean, np.sqrt(np.maximum(square - mean**2, 0))


Act = Callable[[Scene], Updates]


def sign_flip(scene: Scene) -> Updates:
    return {name: scene.send(name, -3 * scene.change(name)) for name in scene.bad}


def scaling(scene: Scene) -> Updates:
    return {name: scene.send(name, -100 * scene.change(name)) for name in scene.bad}


def little_is_enough(scene: Scene) -> Updates:
    """Baruch, Baruch and Goldberg 2019: the mean less a little of the spread, disguised as each
    other's neighbour by noise, so that no two look alike.
    """
    mean, deviation = scene.spread()
    found = {}
    for name in scene.bad:
        noise = scene.rng.standard_normal(mean.size) * deviation * 0.5
        found[name] = scene.send(name, mean - 1.5 * deviation + noise)
    return found


def capture(scene: Scene) -> Updates:
    """Share the elements that fewest others share, all with one far value; else be honest."""
    count = scene.sharers(scene.honest)
    wanted = np.argsort(count, kind="stable")[: count.size // 20]
    found = {}
    for name in scene.bad:
        personal = scene.updates[name].mask.to_bool()
        personal[wanted] = False
        change = scene.change(name)
        change[wanted] = 5.0
        found[name] = scene.send(name, change, Mask.from_bool(personal))
    return found


def free_ride(scene: Scene) -> Updates:
    return {name: scene.send(name, np.zeros(scene.base.size)) for name in scene.bad}


def free_ride_with_noise(scene: Scene) -> Updates:
    size = scene.base.size
    return {n: scene.send(n, 1e-3 * scene.rng.standard_normal(size)) for n in scene.bad}


def sybils(scene: Scene) -> Updates:
    """One hostile change, sent by all of them with a little noise."""
    change = -3 * scene.change(scene.bad[0])
    size = float(np.abs(change).mean())
    noise = {n: 0.05 * size * scene.rng.standard_normal(change.size) for n in scene.bad}
    mask = scene.updates[scene.bad[0]].mask
    return {name: scene.send(name, change + noise[name], mask) for name in scene.bad}


def backdoor(scene: Scene) -> Updates:
    """What training on marked images gave, stretched to the median of honest lengths, and no more:
    it knows the bound.
    """
    bound = float(np.median([np.linalg.norm(scene.change(name)) for name in scene.honest]))
    found = {}
    for name in scene.bad:
        change = scene.change(name)
        found[name] = scene.send(name, change * bound / max(float(np.linalg.norm(change)), 1e-12))
    return found


def honestly(_: Scene) -> Updates:
    return {}


@dataclass(frozen=True)
class Attack:
    """An attack: what is sent, what its clients train on, and what its success is measured by."""

    name: str
    act: Act
    learns: str = ""  # "flipped" labels or "marked" images
    success: str = ""  # "captured", "accepted" or "marked"


ATTACKS = (
    Attack("sign flip, × 3", sign_flip),
    Attack("scaling, × −100", scaling),
    Attack("little is enough", little_is_enough),
    Attack("label flip", honestly, learns="flipped"),
    Attack("rare-element capture", capture, success="captured"),
    Attack("free rider", free_ride, success="accepted"),
    Attack("free rider with noise", free_ride_with_noise, success="accepted"),
    Attack("sybils", sybils, success="accepted"),
    Attack("adaptive backdoor", backdoor, learns="marked", success="marked"),
)
UNITS = {
    "captured": "elements captured",
    "accepted": "% of its updates averaged",
    "marked": "% of marked images",
    "": "",
}


# --- a run under attack ------------------------------------------------------------------------


@dataclass
class Watch:
    """Stands between clients and coordinator: lets attackers act, and counts what came of it."""

    attack: Attack | None
    bad: Sequence[str]
    settings: RunSettings
    rng: np.random.Generator
    bases: list[FloatVector] = field(default_factory=list)
    minority: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    averaged: list[float] = field(default_factory=list)

    def __call__(self, _: int, base: FloatVector, updates: Updates) -> Updates:
        scene = Scene(base, dict(updates), self.bad, self.rng)
        sent = {**updates, **(self.attack.act(scene) if self.attack else {})}
        after = Scene(base, sent, self.bad, self.rng)
        self.bases.append(base.copy())
        self.minority.append(after.sharers(self.bad) * 2 < after.sharers(list(sent)))
        self.averaged.append(self._averaged(base, sent))
        return sent

    def _averaged(self, base: FloatVector, sent: Updates) -> float:
        rules = self.settings.influence
        if rules is None or not self.bad:
            return 1.0
        names = list(sent)
        parts = [Contribution(sent[n].mask, sent[n].values) for n in names]
        kept = {names[place] for place in sift(base, parts, rules).kept}
        return len(kept & set(self.bad)) / len(self.bad)

    def captured(self, last: FloatVector) -> int:
        """Elements that moved in a round in which attackers were at least half of who shared."""
        pairs = zip(self.bases, [*self.bases[1:], last], self.minority, strict=True)
        return sum(int(((a != b) & ~fewer).sum()) for a, b, fewer in pairs)


@dataclass(frozen=True)
class Result:
    """Mean accuracy of honest clients (percent, with their personal part), and success."""

    accuracy: float
    success: float


def _settings(seed: int, *, guarded: bool) -> RunSettings:
    return RunSettings(
        rounds=ROUNDS,
        seed=seed,
        policy=preset("fedselect"),
        training=Training(steps=STEPS, batch_size=20, learning_rate=0.1, clip_norm=5.0),
        round=GUARDED if guarded else PLAIN,
        influence=DEFENCE if guarded else None,
    )


def run(world: World, attack: Attack | None, bad: int, *, guarded: bool) -> Result:
    """One whole run."""
    settings = _settings(world.seed, guarded=guarded)
    names = sorted(world.train)
    hostile = names[::-1][:bad]
    tasks = world.tasks(_poisoned(world, attack, hostile))
    watch = Watch(attack, hostile, settings, np.random.default_rng([world.seed, 5]))
    simulated = SimulatedRun(tasks, settings)
    for _ in range(settings.rounds):
        simulated.round(simulated.names, tamper=watch)
    found = simulated.result()
    honest = [name for name in names if name not in hostile]
    accuracy = fmean(
        100 * found.scores[name]["pre"].correct / found.scores[name]["pre"].total for name in honest
    )
    return Result(accuracy, _success(world, attack, watch, found))


def _poisoned(world: World, attack: Attack | None, bad: Sequence[str]) -> dict[str, Examples]:
    learns = attack.learns if attack else ""
    found: dict[str, Examples] = {}
    for name in bad:
        images, labels = world.train[name]
        if learns == "flipped":
            found[name] = (images, 9 - labels)
        elif learns == "marked":
            goal = np.full_like(labels, TARGET)
            found[name] = (np.concatenate([images, triggered(images)]), np.append(labels, goal))
    return found


def _success(world: World, attack: Attack | None, watch: Watch, found: Simulation) -> float:
    kind = attack.success if attack else ""
    if kind == "captured":
        return float(watch.captured(found.values))
    if kind == "accepted":
        return 100 * fmean(watch.averaged)
    if kind != "marked":
        return 0.0
    images, labels = world.common
    others = labels != TARGET
    goal = np.full(int(others.sum()), TARGET)
    marked = (triggered(images[others]), goal)
    learner = TorchLearner(Site(marked, marked, seed=world.seed))
    score = learner.scores([("it", found.values)], own="it", settings=watch.settings)["it"]
    return 100 * score.correct / score.total


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One attack at one share: accuracy lost against nobody attacking, and success; off and on."""

    attack: str
    share: str
    kind: str  # of success
    lost: Sequence[float]
    success: Sequence[float]

    @property
    def met(self) -> bool:
        """Whether the defence holds what is wanted of it."""
        captured = self.kind == "captured" and self.success[1] > 0
        return self.lost[1] <= MOST_LOST and not captured


def measure(seeds: Sequence[int]) -> tuple[list[Row], dict[str, float]]:
    """All runs, means over seeds; and the accuracy where nobody attacks, off and on."""
    worlds = [World.of(seed) for seed in seeds]
    clean: dict[tuple[int, bool], float] = {}
    for guarded in (False, True):
        for bad in HOSTILE.values():  # of the clients that stay honest in that column
            clean[bad, guarded] = fmean(_quiet(world, bad, guarded=guarded) for world in worlds)
    rows = []
    for attack in ATTACKS:
        for share, bad in HOSTILE.items():
            pair = [
                [run(world, attack, bad, guarded=guarded) for world in worlds]
                for guarded in (False, True)
            ]
            lost = [clean[bad, False] - fmean(each.accuracy for each in found) for found in pair]
            success = [fmean(each.success for each in found) for found in pair]
            rows.append(Row(attack.name, share, attack.success, lost, success))
            print(f"{attack.name} {share}: lost {lost}, success {success}", file=sys.stderr)
    means = {
        name: fmean(clean[bad, guarded] for bad in HOSTILE.values())
        for name, guarded in (("off", False), ("on", True))
    }
    return rows, means


_CLEAN: dict[tuple[int, bool], Simulation] = {}


def _quiet(world: World, bad: int, *, guarded: bool) -> float:
    """Accuracy of those who stay honest while nobody attacks."""
    key = (world.seed, guarded)
    if key not in _CLEAN:
        _CLEAN[key] = simulate(world.tasks({}), _settings(world.seed, guarded=guarded))
    scores = _CLEAN[key].scores
    honest = sorted(world.train)[: CLIENTS - bad]
    return fmean(100 * scores[n]["pre"].correct / scores[n]["pre"].total for n in honest)


def line(rows: Sequence[Row], clean: Mapping[str, float], seeds: int) -> Json:
    """What was found, as results of benchmarks are kept; ``rows`` and ``clean`` make the table."""
    limit = ("the limit", MOST_LOST, 1.0, "points")
    figures = [
        asdict(Figure(f"lost with the defence on, {row.attack}, {row.share}", row.lost[1], *limit))
        for row in rows
    ]
    size = {"clients": CLIENTS, "rounds": ROUNDS, "seeds": seeds}
    head = {"bench": "attacks", "form": "full", "size": size, "figures": figures, "curves": []}
    notes = ["Without the defence, and what attackers reach: [SECURITY.md](SECURITY.md)."]
    kept = {"rows": [asdict(row) for row in rows], "clean": dict(clean)}
    return {**head, "notes": notes, "error": "", **kept}


def table(found: Json) -> str:
    """A result as the text between the marks of docs/SECURITY.md."""
    return "\n".join(_table(found)) + "\n"


def _table(found: Json) -> Iterator[str]:
    seeds, clean = found["size"]["seeds"], found["clean"]
    yield (
        f"`python -m bench.attacks` ({seeds} seeds): {CLIENTS} clients of scikit-learn's digits, "
        f"{ROUNDS} rounds of {STEPS} steps, policy `fedselect`, attackers that know all that is "
        f"sent. *Off*: the defaults, k = {PLAIN.min_contributors}. *On*: k = "
        f"{GUARDED.min_contributors}, `rule: {DEFENCE.rule}`, "
        f"`clip_quantile: {DEFENCE.clip_quantile}`, `likeness: {DEFENCE.likeness}`. Accuracy is "
        f"that of honest clients with their personal parts: {clean['off']:.1f} % with nobody "
        f"attacking and the defence off, {clean['on']:.1f} % with it on. Points lost count from "
        "the former."
    )
    yield ""
    yield "| attack | hostile | lost, off | lost, on | success, off | success, on | |"
    yield "|---|---|---|---|---|---|---|"
    for row in (Row(**each) for each in found["rows"]):
        verdict = "met" if row.met else "**missed**"
        unit = UNITS[row.kind]
        shown = [f"{each:.0f} {unit}" if unit else "" for each in row.success]
        lost = [f"{each:.1f}" for each in row.lost]
        yield f"| {row.attack} | {row.share} | {' | '.join([*lost, *shown])} | {verdict} |"
    yield ""
    yield (
        f"Wanted: at most {MOST_LOST:.0f} points lost with the defence on, 0 elements captured (an "
        "element is captured if it moves in a round in which attackers are at least half of those "
        "who share it)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="append to this file, leave the docs alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place, begun = machine(), time.monotonic()
    rows, clean = measure(range(FIRST_SEED, FIRST_SEED + options.seeds))
    found = place | line(rows, clean, options.seeds)
    found["seconds"] = round(time.monotonic() - begun, 1)
    print(table(found))
    if options.results is not None:
        append([found], options.results)
        return
    record([found])
    write(found)


def write(found: Json) -> None:
    """Put a result's table between the marks of docs/SECURITY.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
