"""What a step of training moves: all of a parameter, or the elements that a mask lets move.

Owns how a mask is laid over parameters, how long the steps of personal elements are, and how a
budget of steps is shared. Must not train.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedselect.masks import Mask
from fedselect.policies import Policy
from fedselect.space import Slot

Trainable = list[tuple[Slot, nn.Parameter]]  # with the slot each lies in
Moves = list[tuple[nn.Parameter, Tensor | None]]  # None: all of it; else see _bits


def split(moving: Trainable, mask: Mask) -> tuple[Moves, Moves]:
    """(personal, shared) moves of parameters under a mask, keyed by name."""
    bits = mask.to_bool()
    personal: Moves = []
    shared: Moves = []
    for slot, parameter in moving:
        own = torch.from_numpy(bits[slot.offset : slot.stop]).view(slot.shape)
        count = int(own.sum())
        own = own.to(parameter.device)
        if count:
            personal.append((parameter, None if count == slot.size else _bits(own, parameter)))
        if count < slot.size:
            shared.append((parameter, _bits(~own, parameter) if count else None))
    return personal, shared


def _bits(moving: Tensor, parameter: Tensor) -> Tensor:
    """For each element all bits or none, as integers of the parameter's width.

    What a gradient keeps under them is itself or +0, also where it is not finite; and it is a
    tenth of the work of `masked_fill_`.
    """
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return -moving.to(width)


def rates(policy: Policy, mask: Mask) -> Tensor | None:
    """What gradients are multiplied by before a step, (D,): ρ at personal elements, 1 at shared
    ones, so that θ_j ← θ_j − η·ρ·g_j there. None where all steps are alike.

    After clipping, and after what scores gather of gradients: neither knows of ρ.
    """
    if policy.personal_rate == 1 or mask.personal == 0:
        return None
    ones = torch.ones(mask.dim)
    return ones.masked_fill_(torch.from_numpy(mask.to_bool()), policy.personal_rate)


def shares(steps: int, parts: list[Moves]) -> list[int]:
    """Steps of each part; half for the personal one, unless one of them is empty."""
    if len(parts) == 1:
        return [steps]
    personal, shared = parts
    first = (steps // 2 if shared else steps) if personal else 0
    return [first, steps - first]
