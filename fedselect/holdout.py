"""The hold-out gate: a client keeps a mask only if it lowers its loss on examples set aside.

Owns the fold and the gate's rule. Source: our own; measured in docs/POLICIES.md. With θ_t the own
model after each participation of the window and g_t the shared model that the client met next,

    d = mean over t of  L(M ? θ_t : g_t) − L(g_t)

where L is the mean loss over the fold and ``M ? θ : g`` takes the elements of the mask from θ. The
mask M is kept if d < 0; otherwise everything is shared, and the client is one of FedAvg.

The fold is one fixed fifth, and no participation of the window trains on it: masks that are judged
by examples which their models were trained on look far too good. It is every fifth example of a
pass of ``train_batches`` under one fixed seed, and its digest is kept: a task that gives other
examples then is refused, not trusted. Must not know states, files or when a gate is due.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedselect.errors import TrainingError
from fedselect.masks import Mask
from fedselect.space import FloatVector
from fedselect.task import Batch

FOLDS = 5
Loss = Callable[[FloatVector], float]


@dataclass(frozen=True)
class Fold:
    """A client's training data with a fifth set aside, either as one batch of all its examples.

    ``digest`` is the SHA-256 (hex) of the examples that are ``held``.
    """

    kept: Batch
    held: Batch
    digest: str

    def one_pass(self, size: int) -> Iterator[Batch]:
        """Batches of what may be trained on, in an order of torch's random generator."""
        return drawn(self.kept, size)

    def batches(self, size: int) -> Iterator[tuple[Batch, int]]:
        """Batches of what is held out, with their lengths, always the same."""
        for rows in torch.split(torch.arange(_length(self.held)), size):
            yield _rows(self.held, rows), len(rows)


def set_aside(batches: Iterable[Batch]) -> Fold:
    """Split one pass over the training data.

    Raises:
        TrainingError: fewer than 2 examples, or batches that are not made of tensors with one
            entry for each example.
    """
    whole = joined(list(batches))
    places = torch.arange(_length(whole))
    held = places % FOLDS == 0
    if len(places) < 2:
        raise TrainingError(
            f"the hold-out gate needs at least 2 training examples, there are {len(places)}"
        )
    digest = hashlib.sha256()
    out = _rows(whole, places[held])
    for tensor in tensors(out):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Fold(_rows(whole, places[~held]), out, digest.hexdigest())


def gain(
    loss: Loss,
    mask: Mask,
    never: Mask,
    *,
    trained: Sequence[FloatVector],
    shared: Sequence[FloatVector],
) -> float:
    """−d: how much less a model loses on the fold for its mask; the gate keeps it if above 0.

    ``never`` are the elements that never travel; they are the client's own on either side.
    """
    own, still = mask.to_bool(), never.to_bool()
    return fmean(
        loss(np.where(still, theta, base)) - loss(np.where(own, theta, base))
        for theta, base in zip(trained, shared, strict=True)
    )


# --- batches of tensors ------------------------------------------------------------------------


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all examples.

    Raises:
        TrainingError: no batches, or as :func:`mapped`.
    """
    if not batches:
        raise TrainingError("train_batches() gave no batch, so there are no examples")
    try:
        return mapped(torch.cat, *batches)
    except RuntimeError as error:
        raise TrainingError(f"these batches cannot be put together: {error}") from error


def drawn(whole: Batch, size: int) -> Iterator[Batch]:
    """One pass over all examples of a batch, in an order of torch's random generator."""
    for rows in torch.split(torch.randperm(_length(whole)), size):
        yield _rows(whole, rows)


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return mapped(lambda parts: parts[0][rows.to(parts[0].device)], batch)


def _length(batch: Batch) -> int:
    lengths = {len(tensor) for tensor in tensors(batch)}
    if len(lengths) != 1:
        raise TrainingError(
            f"tensors need one entry for each example, got lengths {sorted(lengths)}"
        )
    return lengths.pop()


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch.

    Raises:
        TrainingError: as :func:`mapped`.
    """
    found: list[Tensor] = []
    mapped(lambda parts: found.append(parts[0]), batch)
    return found


def mapped(change: Callable[[tuple[Tensor, ...]], Any], *batches: Batch) -> Batch:
    """Apply a function to the tensors that are at the same place of all batches.

    Raises:
        TrainingError: they are not made of tensors with one entry for each example, or not alike.
    """
    first = batches[0]
    if not _alike(batches):
        raise TrainingError(
            "batches that are put together must be made alike: the same types, keys and lengths"
        )
    if isinstance(first, Tensor) and first.dim():
        return change(batches)
    if isinstance(first, Mapping):
        return {key: mapped(change, *(each[key] for each in batches)) for key in first}
    if isinstance(first, tuple | list):
        parts = [mapped(change, *each) for each in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TrainingError(
        "only batches of tensors (alone, or in tuples, lists or dicts) with one entry for each "
        f"example can be put together, got {type(first).__name__}"
    )


def _alike(batches: Sequence[Batch]) -> bool:
    """Whether batches are made of the same, one level deep."""
    first = batches[0]
    if len(set(map(type, batches))) > 1:
        return False
    if isinstance(first, Mapping):
        return all(each.keys() == first.keys() for each in batches)
    return not isinstance(first, tuple | list) or len(set(map(len, batches))) == 1
