"""Bytes on the wire against FedAvg in float32, and what encoding costs in time.

FedAvg sends 4 bytes per element up and 4 down, in every round. Ours are whole files as they are
stored, heads and tables included, of a client that has half of the model to itself: the update, and
the delta file of the version that the round publishes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bench.harness import Figure, Outcome, Room, bench
from fedselect import wire
from fedselect.aggregate import Contribution, aggregate
from fedselect.deltafiles import step
from fedselect.deltas import (
    DELTA_ENCODINGS,
    SCALE_BLOCK,
    DeltaEncoding,
    Frames,
    pack,
    quantise,
    scale_counts,
)
from fedselect.feedback import write_update
from fedselect.layout import header_size, read_step_layout
from fedselect.maskcoding import decode_mask, encode_mask
from fedselect.masks import Mask
from fedselect.personal import Participation, PersonalState
from fedselect.policies import RunSettings, Training, Wire, preset
from fedselect.space import FloatVector
from fedselect.tasks.digits import DigitsTask
from fedselect.tasks.fashion_mnist import FashionMnistTask
from fedselect.training import TorchLearner

PERSONAL = 0.5
SPACE = "5" * 64  # no file is compared with a space here
MB = 1e6
# Of FedAvg's bytes, both ways; by encoding and whether the mask changes in every round.
WANTED = {
    ("bf16", True): 0.27,
    ("bf16", False): 0.27,
    ("int8", True): 1 / 6,
    ("int8", False): 1 / 7,
}
DENSITIES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.99, 0.999)
PARTS = ("header", "block_rank", "lengths", "mask", "scales", "values")


class Round(NamedTuple):
    """The files of one round: every client's update, with the mask and without, and the delta."""

    encoding: DeltaEncoding
    size: int
    with_mask: list[bytes]
    without: list[bytes]
    delta: bytes


# --- bytes -------------------------------------------------------------------------------------


@bench(
    quick={"size": 1_000_000, "clients": 4, "rounds": 4, "trained": ["digits"]},
    full={"size": 2_000_000, "clients": 10, "rounds": 5, "trained": ["digits", "Fashion-MNIST"]},
    minutes=(1, 10),
)
def wire_bytes(_: Room, *, size: int, clients: int, rounds: int, trained: Sequence[str]) -> Outcome:
    """Payloads of random and of trained deltas, both ways, and what coded masks cost."""
    torch.set_num_threads(1)
    figures, rows = [], []
    for encoding in DELTA_ENCODINGS:
        found = {"normal deltas": _normal(encoding, size=size, clients=clients)}
        for name in trained:
            tasks = [WIDE[name](client) for client in range(clients)]
            found[f"{name}, trained"] = _trained(encoding, tasks, rounds=rounds)
        for name, made in found.items():
            label = f"{encoding}, {name}, {made.size / 1e6:.1f} M"
            figures += _figures(label, made)
            rows += _parts(label, made)
    figures += _mask_figures(size)
    head = "| MB | whole | " + " | ".join(PARTS) + " |\n|---|---|" + "---|" * len(PARTS)
    text = "Where the bytes are (an update of one client with its mask, and the delta down):"
    return Outcome(figures, notes=[text, "\n".join([head, *rows])])


def _normal(encoding: DeltaEncoding, *, size: int, clients: int) -> Round:
    """Nothing is harder to code than independent normal deltas under independent random masks."""
    rng = np.random.default_rng(0)
    version = wire.encode_version(SPACE, rng.standard_normal(size, dtype=np.float32))
    files, masks = [], []
    for _ in range(clients):
        masks.append(Mask.from_bool(rng.random(size, dtype=np.float32) < PERSONAL))
        delta = rng.standard_normal(size, dtype=np.float32) * np.float32(1e-3)
        files.append(_both(encoding, masks[-1], delta))
    return _publish(version, encoding, files, masks)[0]


def _both(encoding: DeltaEncoding, mask: Mask, delta: FloatVector) -> tuple[bytes, bytes]:
    meta = wire.UpdateMeta(SPACE, "run", 1, "assignment", "b" * 64, 1, 1, encoding)
    codes = quantise(delta, encoding, mask)
    with_mask, without = (
        wire.encode_delta(meta, codes, mask=mask, send_mask=sent) for sent in (True, False)
    )
    return with_mask, without


def _publish(
    version: bytes, encoding: DeltaEncoding, files: list[tuple[bytes, bytes]], masks: list[Mask]
) -> tuple[Round, bytes]:
    """A round of these updates (each with its mask and without), and the version it publishes."""
    dim = masks[0].dim
    parts = [
        Contribution(mask, wire.update_values(without, mask))
        for (_, without), mask in zip(files, masks, strict=True)
    ]
    mean = aggregate(np.zeros(dim, np.float32), parts, 2)
    result, delta = step(version, mean, space=SPACE, encoding=encoding)
    with_mask, without = ([pair[i] for pair in files] for i in (0, 1))
    return Round(encoding, dim, with_mask, without, delta), result


class Wide(DigitsTask):
    """The digits on a network of more than a million parameters."""

    def network(self) -> nn.Module:
        return _wide(64)


class WideFashion(FashionMnistTask):
    """Fashion-MNIST on a network of more than a million parameters."""

    def network(self) -> nn.Module:
        return _wide(28 * 28)


WIDE: dict[str, Callable[[int], DigitsTask | FashionMnistTask]] = {
    "digits": Wide,
    "Fashion-MNIST": WideFashion,
}


def _wide(inputs: int) -> nn.Module:
    inner = 1024
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, inner),
        nn.ReLU(),
        nn.Linear(inner, inner),
        nn.ReLU(),
        nn.Linear(inner, 10),
    )


def _trained(
    encoding: DeltaEncoding, tasks: list[DigitsTask | FashionMnistTask], *, rounds: int
) -> Round:
    """The last of several rounds of real training; half of every tensor is personal by then."""
    policy = preset("fedselect", growth=PERSONAL, limit=PERSONAL, start_round=1)
    settings = RunSettings(
        rounds=rounds, policy=policy, training=Training(steps=20), wire=Wire(encoding=encoding)
    )
    learners = [TorchLearner(task) for task in tasks]
    states: list[PersonalState | None] = [None] * len(tasks)
    version = wire.encode_version(SPACE, learners[0].initial())
    for number in range(1, rounds + 1):
        base = wire.decode_version(version, space_digest=SPACE, dim=learners[0].space.dim)
        files, masks = [], []
        for place, learner in enumerate(learners):
            done = learner.participate(states[place], base, settings=settings, seed=number)
            pair, states[place] = _update(encoding, done, base=base, before=states[place])
            files.append(pair)
            masks.append(done.mask)
        made, version = _publish(version, encoding, files, masks)
    return made


def _update(
    encoding: DeltaEncoding,
    done: Participation,
    *,
    base: FloatVector,
    before: PersonalState | None,
) -> tuple[tuple[bytes, bytes], PersonalState]:
    meta = wire.UpdateMeta(SPACE, "run", 1, "assignment", "b" * 64, 1, 1, encoding)
    made = [
        write_update(meta, done, base=base, before=before, known=None, send_mask=sent)
        for sent in (True, False)
    ]
    return (made[0][0], made[1][0]), made[1][1]


def _figures(label: str, made: Round) -> list[Figure]:
    found = []
    fedavg = 8 * made.size / MB
    down = len(made.delta)
    for changing, files in ((True, made.with_mask), (False, made.without)):
        up = statistics.fmean(map(len, files))
        masks = "masks change" if changing else "masks fixed"
        wanted = WANTED[made.encoding, changing]
        what = f"{label}, {masks}, both ways"
        found.append(Figure(what, (up + down) / MB, "FedAvg float32", fedavg, wanted, "MB"))
        if not changing:
            found.append(Figure(f"{label}, {masks}, up", up / MB, "up", fedavg / 2, None, "MB"))
    found.append(Figure(f"{label}, down", down / MB, "down", fedavg / 2, None, "MB"))
    return found


def _parts(label: str, made: Round) -> list[str]:
    """Rows of the sizes of every part; the scales, which frames begin with, are one of them."""
    up, down = made.with_mask[0], made.delta
    layouts = (
        wire.read_update_layout(up[: header_size(up)]),
        read_step_layout(down[: header_size(down)]),
    )
    scales = 4 * math.ceil(made.size / SCALE_BLOCK) if made.encoding == "int8" else 0
    rows = []
    for way, data, layout in zip(("up", "down"), (up, down), layouts, strict=True):
        sizes = {name: part.stop - part.start for name, part in layout.sections.items()}
        frames = sizes["values"]
        sizes |= {"scales": scales, "values": frames - scales, "header": header_size(data)}
        cells = [f"{sizes.get(name, 0) / MB:.4f}" for name in PARTS]
        rows.append(f"| {label}, {way} | {len(data) / MB:.3f} | {' | '.join(cells)} |")
    return rows


def _mask_figures(size: int) -> list[Figure]:
    """The density at which a coded random mask is furthest above its entropy, and a difference."""
    rng = np.random.default_rng(1)
    worst: tuple[float, str, float, float] = (0, "", 1, 1)
    for density in DENSITIES:
        mask = Mask.from_bool(rng.random(size, dtype=np.float32) < density)
        found, least = len(encode_mask(mask)), _entropy(mask)
        worst = max(worst, (found / least, f"density {density}", found, least))
    old = Mask.from_bool(rng.random(size, dtype=np.float32) < PERSONAL)
    grown = old | Mask.from_bool(rng.random(size, dtype=np.float32) < 0.05)
    changed = encode_mask(grown, old)
    return [
        Figure(
            f"coded mask, {worst[1]} (the worst of {len(DENSITIES)})",
            worst[2] / 1e3,
            "its entropy",
            worst[3] / 1e3,
            1.05,
            "kB",
        ),
        Figure(
            "coded mask that grew by 5 % of what was shared",
            len(changed) / 1e3,
            "entropy of the difference",
            _entropy(grown ^ old) / 1e3,
            1.05,
            "kB",
        ),
    ]


def _entropy(mask: Mask) -> float:
    """Bytes that codes of independent bits of this density cannot go below on average."""
    share = mask.personal / mask.dim
    return -mask.dim / 8 * sum(p * math.log2(p) for p in (share, 1 - share))


# --- time --------------------------------------------------------------------------------------


@bench(
    quick={"size": 4_000_000, "repeats": 3},
    full={"size": 25_000_000, "repeats": 5},
    minutes=(1, 5),
)
def wire_speed(_: Room, *, size: int, repeats: int) -> Outcome:
    """Processor time of encoding and decoding one client's update, half of it shared."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(size, dtype=np.float32)
    mask = Mask.from_bool(rng.random(size, dtype=np.float32) < PERSONAL)
    rank, counts = mask.block_rank(), scale_counts(mask.packed, size)
    figures = []
    for encoding in DELTA_ENCODINGS:
        codes = quantise(delta, encoding, mask)
        lengths, payload = pack(codes, rank)
        frames = Frames(encoding, size, rank, lengths)
        name = f"{encoding}, {size / 1e6:.0f} M, 50 % shared"
        told: dict[str, Callable[[], object]] = {
            "quantise": partial(quantise, delta, encoding, mask),
            "pack": partial(pack, codes, rank),
            "decode": partial(frames.decode, payload, 0, size),
            "values of": partial(codes.values, counts),
        }
        figures += [
            Figure(f"{what} {name}", _cpu(run, repeats), "the limit", 1000.0 * size / 25e6, 1.0)
            for what, run in told.items()
        ]
    coded = encode_mask(mask)
    for what, run in (
        ("encode", lambda: encode_mask(mask)),
        ("decode", lambda: decode_mask(size, coded)),
    ):
        figures.append(
            Figure(f"{what} its mask", _cpu(run, repeats), "the limit", 1000.0 * size / 25e6, 1.0)
        )
    return Outcome(figures, notes=["The limit is one second for 25 M elements, for each step."])


def _cpu(run: Callable[[], object], repeats: int) -> float:
    """The least processor time of several, ms: the machine is shared."""
    taken = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        taken.append(1000 * (time.process_time() - begun))
    return min(taken)
