"""The parameter space of a torch model: which floating tensors it has, of what kind and role.

Owns the reading of a module's tensors, tied ones included. Must not train or change anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedselect.errors import SpaceError
from fedselect.space import DEFAULT_ROLES, Kind, ParameterSpace, Role

_NORM_LAYERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_STATISTICS = {"running_mean", "running_var"}


def space_of(model: nn.Module, roles: Mapping[str, Role]) -> ParameterSpace:
    """The parameter space of a model: its floating tensors in ``state_dict`` order.

    Tied tensors are listed once, under their first name. The kind follows from the owning module
    and the attribute: a norm layer's ``weight`` is ``norm`` and its running statistics are
    ``buffer``; other parameters are ``weight`` or ``bias`` by what their name contains. The role is
    what ``roles`` says, else ``frozen`` without ``requires_grad``, else the kind's default
    (ALGORITHM §1.6). Integer buffers are left out.

    Raises:
        SpaceError: a tensor whose kind is unknown and whose role is not declared, a role for a
            tensor that does not exist, or tensors that share memory in different layouts.
    """
    tensors, aliases = _floating(model)
    _check_roles(roles, tensors, aliases)
    owners = dict(model.named_modules(remove_duplicate=False))
    rows = []
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        kind = _kind(owners.get(path), attribute, tensor)
        still = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if kind is None and not still and name not in roles:
            raise SpaceError(
                f"tensor {name!r} of shape {tuple(tensor.shape)} is no weight, no bias and no "
                "running statistic, so nothing says whether it may be shared; declare it in your "
                f"task: def roles(self): return {{{name!r}: Role.SHARED}} (or SELECTABLE, "
                "PERSONAL, FROZEN)"
            )
        kind = kind or (Kind.WEIGHT if isinstance(tensor, nn.Parameter) else Kind.BUFFER)
        role = roles.get(name, Role.FROZEN if still else DEFAULT_ROLES[kind])
        rows.append((name, tuple(tensor.shape), kind, role))
    return ParameterSpace.of(rows)


def _kind(owner: nn.Module | None, attribute: str, tensor: Tensor) -> Kind | None:
    norm = isinstance(owner, _NORM_LAYERS)
    if not isinstance(tensor, nn.Parameter):
        return Kind.BUFFER if norm and attribute in _STATISTICS else None
    if "weight" in attribute:
        return Kind.NORM if norm else Kind.WEIGHT
    return Kind.BIAS if "bias" in attribute else None


def _floating(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct floating tensors by first name, and the first name by each further name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_at: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise SpaceError(f"state_dict entry {name!r} is no real tensor; it cannot be federated")
        if not tensor.is_floating_point():
            continue
        first = first_at.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first == name:
            tensors[name] = tensor
        elif _layout(tensors[first]) == _layout(tensor):
            aliases[name] = first
        else:
            raise SpaceError(
                f"tensors {first!r} and {name!r} share memory in different layouts; give each its "
                "own tensor, or tie them as one parameter"
            )
    return tensors, aliases


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _check_roles(
    roles: Mapping[str, Role], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    for name in roles:
        if name in aliases:
            raise SpaceError(
                f"roles() names {name!r}, which is tied to {aliases[name]!r}: give that one a role"
            )
        if name not in tensors:
            raise SpaceError(
                f"roles() names {name!r}, but the model has no such floating tensor; it has "
                f"{', '.join(list(tensors)[:20])}"
            )
