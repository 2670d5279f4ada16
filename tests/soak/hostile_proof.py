"""Hostile files are harmless: the whole corpus, and many thousand damaged files."""

from __future__ import annotations

from collections import Counter

from tests.hostile.corpus import FOR_KNOWN, HOSTILE, KNOWN, PLAN
from tests.hostile.corpus_deltas import CASES
from tests.hostile.trial import Trial, expected, mutated

from .proofs import Figures, Room, proof

SECONDS, MEMORY = 1.0, 256 * 1024**2


@proof(
    promise="hostile files are harmless",
    test="hand-made files and seeded mutations of honest ones before the real judge, each compared "
    "with the decoder of whole files",
    target="≥ 60 + 10,000 files: 0 crashes, 0 accepted outside the schema, each ≤ 1 s and ≤ 256 MB",
    quick={"files": 1_000},
    full={"files": 10_000},
    minutes=(2, 10),
)
def hostile_files(room: Room, *, files: int) -> Figures:
    """Judge them all and say what it cost."""
    trial = Trial()
    found: Counter[str] = Counter()
    made = [(data, code, PLAN) for code, data in HOSTILE.values()]
    made += [(data, code, KNOWN) for code, data in FOR_KNOWN.values()]
    made += [(data, code, plan) for _, plan, code, data in CASES]
    differing = sum(trial.outcome(data, plan) != code for data, code, plan in made)
    outside = 0
    for data, plan in mutated(files, room.seed):
        outcome, right = trial.outcome(data, plan), expected(data, plan)
        found[outcome] += 1
        differing += outcome != right
        outside += outcome == "ok" != right
    trial.court.close()
    met = not (trial.deaths or outside or differing)
    numbers = {
        "hand_made": len(made),
        "mutated": files,
        "crashes": trial.deaths,
        "accepted_outside": outside,
        "other_code": differing,
        "still_valid": found["ok"],
        "slowest_s": round(trial.slowest, 3),
        "peak_mib": trial.peak // 2**20,
    }
    return Figures(
        met=met and trial.slowest <= SECONDS and trial.peak <= MEMORY,
        measured=f"{len(made)} + {files:,} files: {trial.deaths} crashes, {outside} accepted "
        f"outside the schema, {differing} decided otherwise than by the decoder, "
        f"{found['ok']} still valid; slowest {trial.slowest:.2f} s, "
        f"peak {trial.peak / 2**20:.0f} MiB",
        numbers=numbers,
    )
