"""Versions and personalized models as plain ``state_dict`` files, for whoever has no FedSelect.

Owns the file: safetensors with the model's own tensor names, float32, beside them the integer
buffers that a client has kept. Names that are tied to another one are not repeated, so that a model
with such, or with integer buffers, loads it with ``strict=False``. Must not know torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from fedselect.errors import SpaceError
from fedselect.space import FloatVector, ParameterSpace
from fedselect.wire import decode_version, file_digest

Tensors = dict[str, npt.NDArray[Any]]


def version_tensors(version: bytes, space: ParameterSpace) -> Tensors:
    """The tensors of a version file by name, in their shapes.

    Raises:
        WireError: no version file of this space.
    """
    values = decode_version(version, space_digest=space.digest, dim=space.dim)
    return named(values, space)


def named(
    values: FloatVector,
    space: ParameterSpace,
    buffers: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Tensors:
    """A (D,) vector as tensors by name, and integer buffers beside them."""
    return {**space.unflatten(values), **(buffers or {})}


def state_dict_file(tensors: Mapping[str, npt.NDArray[Any]], **facts: str) -> bytes:
    """A safetensors file of tensors; ``facts`` go into its metadata.

    Raises:
        SpaceError: a tensor has a name that safetensors keeps for itself.
    """
    if "__metadata__" in tensors:
        raise SpaceError("a tensor called '__metadata__' cannot be written to safetensors")
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return safetensors.numpy.save(whole, {"format": "pt", **facts})


def export_version(version: bytes, space: ParameterSpace) -> bytes:
    """A version file as a plain ``state_dict``.

    Raises:
        WireError: no version file of this space.
    """
    return state_dict_file(version_tensors(version, space), version_sha256=file_digest(version))
