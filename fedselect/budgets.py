"""The trainings besides a participation's own, and how chance is seeded for any of them.

Owns the settings of the local-only baseline and of the fine-tuning at the end, and the words that
stand for a client's name in their seeds. Must not train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedselect.policies import RunSettings, preset

FINE_TUNING = "fine-tuning"
LOCAL_ONLY = "local-only"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside, leave the caller's random generators as they were."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would note, for every kind of device that is not there, a call for later
        # with its whole stack: most of the time that this takes, and memory that is never freed.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def finishing(settings: RunSettings) -> RunSettings:
    """The settings of the fine-tuning at the end: everything moves."""
    policy = settings.policy.model_copy(update={"trains": "all"})
    return settings.model_copy(update={"policy": policy})


def without_others(settings: RunSettings) -> RunSettings:
    """The settings of the local-only baseline, with as many gradient steps."""
    training = settings.training
    if training.epochs is not None:
        epochs = settings.policy.passes * training.epochs
        training = training.model_copy(update={"epochs": epochs})
    return settings.model_copy(update={"policy": preset("local"), "training": training})
