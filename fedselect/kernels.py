"""Masked accumulation, compiled with numba; nothing else is compiled in this project.

Owns the inner loops over packed masks and compact values. Must not know files, rounds or clients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fedselect.masks import ByteVector
from fedselect.space import FloatVector

Float64Vector = npt.NDArray[np.float64]
CountVector = npt.NDArray[np.int64]


@njit(cache=True, nogil=True)
def _accumulate(packed, values, weight, total, weights, counts):  # type: ignore[no-untyped-def]
    position = 0
    size = total.size
    for byte in range(packed.size):
        bits = packed[byte]
        if bits == 0xFF:
            continue
        start = 8 * byte
        for bit in range(min(8, size - start)):
            if not (bits >> bit) & 1:
                j = start + bit
                total[j] += weight * np.float64(values[position])
                weights[j] += weight
                counts[j] += 1
                position += 1
    return position


def accumulate(
    packed: ByteVector,
    values: FloatVector,
    *,
    weight: float,
    sums: tuple[Float64Vector, Float64Vector, CountVector],
) -> int:
    """Add one client's compact values to the running sums of a range of n elements.

    ``packed`` (ceil(n/8),) is the mask of the range, ``values`` hold its shared elements in order,
    ``sums`` are (Σ w·x, Σ w, count), each of shape (n,), changed in place. Returns the number of
    values read. The arithmetic is float64, one multiplication and one addition per element.
    """
    total, weights, counts = sums
    return int(_accumulate(packed, values, float(weight), total, weights, counts))
