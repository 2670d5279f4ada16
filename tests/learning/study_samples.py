"""Small grids, and results that nobody had to run for."""

from base64 import b64encode

import numpy as np

from fedselect.policies import Training
from fedselect.study.cells import Result
from fedselect.study.grid import Grid, GridPolicy, GridSplit


def grid(*policies, rounds=4, seeds=(0,), **changes):
    return Grid(
        seeds=seeds,
        training=Training(steps=2),
        readings=2,
        split=(GridSplit(name="few", task="digits-mixed", rounds=rounds),),
        policy=tuple(GridPolicy(name=name, preset=name) for name in policies),
        **changes,
    )


def only(study):
    (cell,) = study.cells()
    return cell


def result(policy, seed, pre, post=None, *, total=100, split="few"):
    """A result of two readings whose clients got so many right."""
    post = pre if post is None else post
    hits = []
    for right in post:
        packed = np.packbits(np.arange(total) < right).tobytes()
        hits.append(b64encode(packed).decode())
    return Result(
        key=f"{split}/{policy}/{seed}",
        split=split,
        policy=policy,
        seed=seed,
        rounds=10,
        steps=20,
        elements=50,
        clients=tuple(f"c{n}" for n in range(len(pre))),
        examples=(total,) * len(pre),
        pre=(tuple(pre), tuple(pre)),
        post=(tuple(post), tuple(post)),
        hits=tuple(hits),
        sent=(1000,) * len(pre),
        personal=(0.0,) * len(pre),
        version="0" * 64,
        seconds=0,
    )
