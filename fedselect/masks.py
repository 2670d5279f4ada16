"""Packed masks over a parameter space: 1 = personal, 0 = shared.

Owns the bit layout (little bit order, zero padding), the algebra and the statistics.
Must not decide which elements become personal: that is ``policies`` and ``selection``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedselect.errors import MaskError
from fedselect.space import ParameterSpace, Role, Slot

BoolVector = npt.NDArray[np.bool_]
ByteVector = npt.NDArray[np.uint8]
BLOCK = 65_536  # elements per entry of block_rank


@dataclass(frozen=True, eq=False)
class Mask:
    """A packed bitmap over D elements.

    ``packed`` has shape (ceil(D/8),), dtype uint8, little bit order: element j is bit ``j % 8`` of
    byte ``j // 8``. Bits behind D are 0.
    """

    dim: int
    packed: ByteVector

    def __post_init__(self) -> None:
        if self.packed.dtype != np.uint8 or self.packed.shape != (packed_size(self.dim),):
            raise MaskError(
                f"a mask over {self.dim} elements needs {packed_size(self.dim)} bytes of uint8, "
                f"got {self.packed.shape} of {self.packed.dtype}",
                code="mask_size",
            )
        if self.dim % 8 and int(self.packed[-1]) >> (self.dim % 8):
            raise MaskError(f"bits behind element {self.dim} must be 0", code="mask_padding")

    @classmethod
    def from_bool(cls, personal: BoolVector) -> Mask:
        """Pack a boolean vector of shape (D,)."""
        return cls(personal.size, np.packbits(personal, bitorder="little"))

    @classmethod
    def from_bytes(cls, dim: int, data: bytes) -> Mask:
        """Wrap packed bytes.

        Raises:
            MaskError: wrong length or padding bits set.
        """
        return cls(dim, np.frombuffer(data, dtype=np.uint8))

    @classmethod
    def empty(cls, dim: int) -> Mask:
        """Everything shared."""
        return cls(dim, np.zeros(packed_size(dim), dtype=np.uint8))

    @classmethod
    def full(cls, dim: int) -> Mask:
        """Everything personal."""
        packed = np.full(packed_size(dim), 0xFF, dtype=np.uint8)
        if dim % 8:
            packed[-1] >>= 8 - dim % 8
        return cls(dim, packed)

    @classmethod
    def over(cls, space: ParameterSpace, slots: tuple[Slot, ...]) -> Mask:
        """Personal exactly in the given slots; takes no more memory than the packed bytes."""
        packed = np.zeros(packed_size(space.dim), dtype=np.uint8)
        for slot in slots:
            _set_bits(packed, slot.offset, slot.stop)
        return cls(space.dim, packed)

    @classmethod
    def initial(cls, space: ParameterSpace) -> Mask:
        """What never travels: the tensors whose role is personal or frozen."""
        return cls.over(space, tuple(space.with_role(Role.PERSONAL, Role.FROZEN)))

    def to_bool(self) -> BoolVector:
        """The mask as a boolean vector of shape (D,)."""
        return np.unpackbits(self.packed, count=self.dim, bitorder="little").view(np.bool_)

    def to_bytes(self) -> bytes:
        """The packed bytes, as they travel and as the digest reads them."""
        return self.packed.tobytes()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the packed bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @cached_property
    def personal(self) -> int:
        """Number of personal elements."""
        return int(np.bitwise_count(self.packed).sum(dtype=np.int64))

    @property
    def shared(self) -> int:
        """Number of shared elements: the length of the values an update must carry."""
        return self.dim - self.personal

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.dim == other.dim
            and np.array_equal(self.packed, other.packed)
        )

    def __hash__(self) -> int:
        return hash((self.dim, self.digest))

    def __or__(self, other: Mask) -> Mask:
        return self._with(other, self.packed | other.packed)

    def __and__(self, other: Mask) -> Mask:
        return self._with(other, self.packed & other.packed)

    def __sub__(self, other: Mask) -> Mask:
        return self._with(other, self.packed & ~other.packed)

    def __xor__(self, other: Mask) -> Mask:
        """The diff of two masks: 1 where they differ."""
        return self._with(other, self.packed ^ other.packed)

    def __le__(self, other: Mask) -> bool:
        """Subset: everything personal here is personal there."""
        return (self - other).personal == 0

    def _with(self, other: Mask, packed: ByteVector) -> Mask:
        if self.dim != other.dim:
            raise MaskError(f"masks over {self.dim} and {other.dim} elements do not combine")
        return Mask(self.dim, packed)

    def jaccard(self, other: Mask) -> float:
        """|A ∩ B| / |A ∪ B|, 1.0 for two empty masks."""
        union = (self | other).personal
        return (self & other).personal / union if union else 1.0

    def block_rank(self) -> npt.NDArray[np.uint64]:
        """Shared elements before each block of 65,536 elements, and in all at the end.

        Shape (ceil(D / 65536) + 1,): entry b is where block b starts inside the compact values,
        which is what a worker needs to range-read one shard.
        """
        per_byte = np.bitwise_count(self.packed)
        starts = np.arange(0, self.packed.size, BLOCK // 8)
        personal = np.add.reduceat(per_byte, starts, dtype=np.int64) if starts.size else starts
        sizes = np.minimum(BLOCK, self.dim - np.arange(starts.size) * BLOCK)
        ranks = np.concatenate(([0], np.cumsum(sizes - personal)))
        return ranks.astype(np.uint64)

    def per_slot(self, space: ParameterSpace) -> dict[str, int]:
        """Personal elements per tensor.

        Raises:
            MaskError: the mask belongs to a space of another size.
        """
        if space.dim != self.dim:
            raise MaskError(f"a mask over {self.dim} elements does not fit a space of {space.dim}")
        return {s.name: self._count(s.offset, s.stop) for s in space.slots}

    def _count(self, start: int, stop: int) -> int:
        """Personal elements of a range, from its bytes alone: no vector of D truth values."""
        if start == stop:
            return 0
        piece = self.packed[start // 8 : packed_size(stop)]
        before = int(piece[0]) & ((1 << start % 8) - 1)
        behind = int(piece[-1]) >> (stop % 8) if stop % 8 else 0
        whole = int(np.bitwise_count(piece).sum(dtype=np.int64))
        return whole - before.bit_count() - behind.bit_count()

    def share(self, space: ParameterSpace) -> float:
        """Personal fraction of the elements that could be personal or shared (frozen left out)."""
        frozen = Mask.over(space, tuple(space.with_role(Role.FROZEN)))
        return (self - frozen).personal / (space.dim - frozen.personal)


def packed_size(dim: int) -> int:
    """Bytes of a packed mask over ``dim`` elements."""
    return (dim + 7) // 8


def _set_bits(packed: ByteVector, start: int, stop: int) -> None:
    first, last = -(-start // 8), stop // 8  # whole bytes
    if first > last:  # all of it inside one byte
        packed[last] |= (1 << stop % 8) - (1 << start % 8)
        return
    if start % 8:
        packed[first - 1] |= 0xFF & (0xFF << start % 8)
    packed[first:last] = 0xFF
    if stop % 8:
        packed[last] |= (1 << stop % 8) - 1
