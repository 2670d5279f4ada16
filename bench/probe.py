"""How well a client's labels can be guessed from its mask, and from the scores that it reports.

The guesser is strong: it knows which labels four fifths of the clients have, and learns from their
masks to tell it of the last fifth (L2 logistic regression, one for each label, five-fold
cross-validation over clients). Its AUC is 0.5 if a mask says nothing and 1 if it says all. Beside
it stands the same with the clients' labels dealt anew, which is what luck gives, and a guess that
has learned nothing: the label whose row of the last layer has most personal elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.harness import Figure, Json, Outcome, Room, bench
from fedselect import Mask
from fedselect.disclosure import Disclosure
from fedselect.evaluations import ScoreReport
from fedselect.policies import Policy, RunSettings
from fedselect.simulate import Execution, Simulation, simulate
from fedselect.space import ParameterSpace, Role, Slot
from fedselect.tasks.arrays import ArrayTask, LabelSkew, mlp

LABELS, PER_CLIENT = 10, 3
TRAIN, TEST = 8, 5  # examples of each of a client's labels
SHARE = 0.2  # of what may be chosen
FOLDS = 5
MOST_LOSS = 20.0  # nats
ROUNDED = Disclosure(round_scores=0.1, round_counts=5)
Matrix = npt.NDArray[np.float64]
Truth = npt.NDArray[np.bool_]
AGAINST = "labels dealt anew"
SCOPES = {
    "tensor": "mask: elements of each tensor (scope tensor)",
    "global": "mask: elements of the model (scope global)",
    "row": "mask: whole rows (scope row)",
}
TENSORS = "mask: whole tensors (made from scope global; no policy here)"
EYE = "; last layer's rows, nothing learned"
SCORES, COARSE = "scores of five models", "scores of five models, rounded"


@dataclass(frozen=True)
class Seen:
    """What the guesser has of all clients: features (clients, n), and a score for each label that
    needs no learning (clients, labels), if there is one.
    """

    features: Matrix
    direct: Matrix | None = None


@bench(
    quick={"clients": 20, "rounds": 4, "seeds": [0], "deals": 2},
    full={"clients": 40, "rounds": 8, "seeds": [0, 1, 2], "deals": 3},
    minutes=(5, 40),
)
def probe(_room: Room, *, clients: int, rounds: int, seeds: Sequence[int], deals: int) -> Outcome:
    import torch

    torch.set_num_threads(1)
    guessed: dict[str, list[float]] = {}
    for seed in seeds:
        split = LabelSkew(clients, per_client=PER_CLIENT, classes=LABELS, seed=seed)
        truth = np.zeros((clients, LABELS), dtype=bool)
        for row, own in zip(truth, split.labels(), strict=True):
            row[own] = True
        for what, seen in _seen(split, rounds):
            for name, value in _guesses(seen, truth, seed=seed, deals=deals).items():
                guessed.setdefault(f"{what}{name}", []).append(value)
    return Outcome([*_figures(guessed)], notes=[*_notes(guessed, len(seeds))])


def _figures(guessed: Mapping[str, Sequence[float]]) -> Iterable[Figure]:
    for what in guessed:
        if not what.endswith(AGAINST):
            luck = guessed[f"{what.removesuffix(EYE)}{AGAINST}"]
            yield Figure(what, fmean(guessed[what]), AGAINST, fmean(luck), unit="AUC")


def _notes(guessed: Mapping[str, Sequence[float]], seeds: int) -> Iterable[str]:
    if seeds > 1:
        spread = max(stdev(values) for values in guessed.values())
        yield f"Means over {seeds} seeds; no standard deviation over seeds is above {spread:.3f}."


def table(line: Json) -> str:
    """A result of this benchmark as the table of docs/PRIVACY.md."""
    rows = [
        f"| {each['what']} | {each['subject']:.2f} | {each['reference']:.2f} |"
        for each in line["figures"]
    ]
    return "\n".join(["| what is seen | AUC | luck |", "|---|---|---|", *rows])


# --- what the guesser sees -----------------------------------------------------------------------


def _seen(split: LabelSkew, rounds: int) -> Iterable[tuple[str, Seen]]:
    tasks = _tasks(split)
    for scope, what in SCOPES.items():
        policy = Policy.model_validate(
            {
                "name": scope,
                "personal": "learned",
                "scope": scope,
                "fraction": SHARE,
                "start_round": rounds // 2,
            }
        )
        settings = RunSettings(rounds=rounds, seed=split.seed, policy=policy)
        run = simulate(tasks, settings, execution=Execution(vectorized=True))
        masks = [run.states[name].merge_mask for name in sorted(run.states)]
        direct = np.array([_last_rows(mask, run.space) for mask in masks])
        yield what, Seen(_features(masks, run.space, _bits), direct)
        if scope == "global":
            yield TENSORS, Seen(_features(masks, run.space, _tensors))
            for name, rule in {SCORES: Disclosure(), COARSE: ROUNDED}.items():
                yield name, Seen(_reported(run, rule))


def _tasks(split: LabelSkew) -> dict[str, ArrayTask]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)

    class Site(ArrayTask):
        def network(self) -> Any:
            return mlp(64, LABELS)

    def site(rows: npt.NDArray[np.int64]) -> ArrayTask:
        parts = [part.reshape(-1) for part in (rows[:, :TRAIN], rows[:, TRAIN:])]
        train, test = ((images[part] / 16, labels[part]) for part in parts)
        return Site(train, test, seed=split.seed)

    rows = split.rows(labels, TRAIN + TEST)
    return {f"site-{number:03}": site(each) for number, each in enumerate(rows)}


def _features(
    masks: Sequence[Mask], space: ParameterSpace, view: Callable[[Mask, list[Slot]], Matrix]
) -> Matrix:
    slots = [slot for slot in space.slots if slot.role is Role.SELECTABLE]
    return np.array([view(mask, slots) for mask in masks])


def _bits(mask: Mask, slots: list[Slot]) -> Matrix:
    chosen = mask.to_bool()
    return np.concatenate([chosen[s.offset : s.stop] for s in slots]).astype(np.float64)


def _tensors(mask: Mask, slots: list[Slot]) -> Matrix:
    """Which tensors are personal if the third with the largest shares was, all or nothing."""
    chosen = mask.to_bool()
    shares = np.array([chosen[s.offset : s.stop].mean() for s in slots])
    most = np.argsort(-shares, kind="stable")[: max(1, len(slots) // 3)]
    return np.isin(np.arange(len(slots)), most).astype(np.float64)


def _last_rows(mask: Mask, space: ParameterSpace) -> Matrix:
    """Personal elements in each label's row of the last layer's weights, (labels,)."""
    last = [s for s in space.slots if s.role is Role.SELECTABLE and s.shape[0] == LABELS][-1]
    rows = mask.to_bool()[last.offset : last.stop].reshape(LABELS, -1)
    return np.asarray(rows.sum(axis=1), dtype=np.float64)


def _reported(run: Simulation, rule: Disclosure) -> Matrix:
    """What the clients' evaluations say, as the run lets them."""
    lines = []
    for name in sorted(run.scores):
        told = [
            ScoreReport(correct=s.correct, total=s.total, loss=s.loss).rounded(rule)
            for _, s in sorted(run.scores[name].items())
        ]
        # A model that has diverged is told apart by being beyond all others.
        numbers = [x for s in told for x in (s.correct / s.total, min(s.loss, MOST_LOSS))]
        lines.append([*numbers, rule.number(run.personal[name], 1)])
    return np.array(lines)


# --- guessing ------------------------------------------------------------------------------------


def _guesses(seen: Seen, truth: Truth, *, seed: int, deals: int) -> dict[str, float]:
    """AUC by what is done: of the clients' own labels (""), of labels dealt anew, and unlearned."""
    rng = np.random.default_rng([seed, 7])
    features = _compact(seen.features)
    lucky = [_auc(features, rng.permutation(truth), seed=seed) for _ in range(deals)]
    found = {"": _auc(features, truth, seed=seed), AGAINST: fmean(lucky)}
    if seen.direct is not None:
        found[EYE] = _mean_auc(truth, seen.direct)
    return found


def _auc(features: Matrix, truth: Truth, *, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = LogisticRegression(max_iter=1000)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    columns = [
        cross_val_predict(model, features, truth[:, label], cv=folds, method="decision_function")
        for label in range(LABELS)
    ]
    return _mean_auc(truth, np.array(columns).T)


def _compact(features: Matrix) -> Matrix:
    """The same clients in as many coordinates as there are clients: scaled features, turned.

    What an L2-regularized linear model makes of them is the same; it takes a hundredth of the time.
    """
    varied = features[:, features.std(axis=0) > 1e-9]
    if varied.shape[1] == 0:
        return np.zeros((len(features), 1))
    scaled = (varied - varied.mean(axis=0)) / varied.std(axis=0)
    lengths, turned = np.linalg.eigh(scaled @ scaled.T / varied.shape[1])
    return np.asarray(turned * np.sqrt(np.maximum(lengths, 0)))


def _mean_auc(truth: Truth, scores: Matrix) -> float:
    """The mean over labels of the chance that a client with the label has the larger score."""
    from sklearn.metrics import roc_auc_score

    return fmean(float(roc_auc_score(truth[:, k], scores[:, k])) for k in range(LABELS))
