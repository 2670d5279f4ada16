"""One column of the aggregation in LLVM's own terms, because nothing above it can say "expand".

Owns the instructions: as many elements as the processor has lanes, of all clients of a group, are
summed in registers, so that the group's sum is formed without one intermediate store. Spreading
compact values over the lanes that share is one instruction with AVX-512, a permutation with AVX2.
Must not know what is summed, or why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function, unpack_tuple
from numba.extending import intrinsic

PREFETCH = 4096  # bytes ahead in each client's values: a page, which no hardware prefetcher crosses

_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_BIT, _BYTE, _INT, _LONG = (ir.IntType(bits) for bits in (1, 8, 32, 64))
# For AVX2: row m says which of the next compact values lane i takes when the sharing lanes are m.
_ORDER = np.maximum(np.cumsum((np.arange(256)[:, None] >> np.arange(8)) & 1, axis=1) - 1, 0)
ORDER = np.ascontiguousarray(_ORDER, dtype=np.int32)


def processor_lanes() -> int:
    """Elements that this processor spreads at once: 16 (AVX-512), 8 (AVX2) or 1."""
    has = binding.get_host_cpu_features().get
    if all(has(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        return 16
    return 8 if has("avx2") else 1


@njit(cache=True, nogil=True)
def add_columns(masks, values, weights, order, columns, sums):  # type: ignore[no-untyped-def]
    """Add ``columns`` columns of a group to the arrays ``sums`` (total, counts, weights), in place.

    ``masks`` and ``values`` are tuples with an address for each client, ``weights`` one of float64,
    empty if all are 1; ``order`` is None for AVX-512, the address of :data:`ORDER` for AVX2.
    Returns the addresses at which each client's values go on.
    """
    where = (sums[0].ctypes.data, sums[1].ctypes.data, sums[2].ctypes.data)
    for index in range(columns):
        values = _column(masks, values, weights, order, (index, *where))  # type: ignore[call-arg]
    return values


@intrinsic
def _column(_, masks, values, weights, order, where):  # type: ignore[no-untyped-def]
    """One column. No ``weights`` means that all are 1, no ``order`` that there is AVX-512."""
    lanes = 16 if order == types.none else 8

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        masks, values, weights, order, where = arguments
        unpacked = [unpack_tuple(builder, each) for each in (masks, values, weights, where)]
        ends = _Emitter(builder, lanes, order).column(*unpacked)
        return context.make_tuple(builder, signature.return_type, ends)

    return values(masks, values, weights, order, where), generate


class _Emitter:
    """Writes the code of one column: ``lanes`` elements of every client of a group."""

    def __init__(self, builder: Any, lanes: int, order: Any) -> None:
        self.b, self.lanes, self._order = builder, lanes, order

    def column(
        self, masks: list[Any], values: list[Any], weights: list[Any], where: list[Any]
    ) -> list[Any]:
        """Sum the clients, add the sum to the running ones; returns where each client goes on."""
        total, weight_sum = self._zero(_DOUBLE), self._zero(_DOUBLE)
        count = self._zero(_BYTE)
        index, *sums = where
        ends = []
        for client, (mask, value) in enumerate(zip(masks, values, strict=True)):
            bits = self.b.not_(self._load(mask, index, ir.IntType(self.lanes)))
            shares = self.b.bitcast(bits, self._vector(_BIT))
            taken = self._call("llvm.ctpop", bits.type, bits)
            wide = self.b.fpext(self._spread(value, bits, taken), self._vector(_DOUBLE))
            if weights:
                splat = self._splat(weights[client])
                wide = self.b.fmul(wide, splat)
                own = self.b.select(shares, splat, self._zero(_DOUBLE))
                weight_sum = self.b.fadd(weight_sum, own)
            total = self.b.fadd(total, wide)
            count = self.b.sub(count, self.b.sext(shares, self._vector(_BYTE)))
            ends.append(self._advance(value, taken))
        self._add(sums[0], index, total, self.b.fadd)
        self._add(sums[1], index, self.b.zext(count, self._vector(_INT)), self.b.add)
        if weights:
            self._add(sums[2], index, weight_sum, self.b.fadd)
        return ends

    def _spread(self, value: Any, bits: Any, taken: Any) -> Any:
        """The next ``taken`` values on the lanes that share, 0.0 on the others."""
        self._prefetch(value)
        one = ir.Constant(_INT, 1)
        first = self.b.sub(self.b.shl(one, self.b.zext(taken, _INT)), one)
        wanted = self.b.bitcast(self.b.trunc(first, bits.type), self._vector(_BIT))
        vector = self._vector(_FLOAT)
        zero = self._zero(_FLOAT)
        # A masked load reads nothing behind the last value, so no buffer needs padding.
        loaded = self._function(
            f"llvm.masked.load.v{self.lanes}f32.p0v{self.lanes}f32",
            vector,
            [self._pointer(value, vector), ir.Constant(_INT, 4), wanted, zero],
        )
        shares = self.b.bitcast(bits, self._vector(_BIT))
        if self.lanes == 16:
            name = "llvm.x86.avx512.mask.expand.v16f32"
            return self._function(name, vector, [loaded, zero, shares])
        row = self._load(self._order, self.b.zext(bits, _LONG), self._vector(_INT))
        placed = self._function("llvm.x86.avx2.permps", vector, [loaded, row])
        return self.b.select(shares, placed, zero)

    def _prefetch(self, value: Any) -> None:
        ahead = self.b.add(value, ir.Constant(_LONG, PREFETCH))
        read, keep, data = ir.Constant(_INT, 0), ir.Constant(_INT, 3), ir.Constant(_INT, 1)
        place = self._pointer(ahead, _BYTE)
        self._function("llvm.prefetch.p0i8", ir.VoidType(), [place, read, keep, data])

    def _advance(self, value: Any, taken: Any) -> Any:
        size = ir.Constant(_LONG, 4)
        return self.b.add(value, self.b.mul(self.b.zext(taken, _LONG), size))

    def _add(self, address: Any, index: Any, vector: Any, operation: Any) -> None:
        place = self._place(address, index, vector.type)
        align = vector.type.element.width // 8 if vector.type.element == _INT else 8
        self.b.store(operation(self.b.load(place, align=align), vector), place, align=align)

    def _load(self, address: Any, index: Any, kind: Any) -> Any:
        return self.b.load(self._place(address, index, kind), align=1)

    def _place(self, address: Any, index: Any, kind: Any) -> Any:
        return self.b.gep(self._pointer(address, kind), [index])

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.b.inttoptr(address, kind.as_pointer())

    def _vector(self, element: Any) -> Any:
        return ir.VectorType(element, self.lanes)

    def _zero(self, element: Any) -> Any:
        return ir.Constant(self._vector(element), [0] * self.lanes)

    def _splat(self, scalar: Any) -> Any:
        single = self.b.insert_element(
            ir.Constant(self._vector(_DOUBLE), ir.Undefined), scalar, ir.Constant(_INT, 0)
        )
        same = ir.Constant(ir.VectorType(_INT, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(single, single, same)

    def _call(self, name: str, kind: Any, argument: Any) -> Any:
        return self._function(f"{name}.i{kind.width}", kind, [argument])

    def _function(self, name: str, kind: Any, arguments: list[Any]) -> Any:
        form = ir.FunctionType(kind, [argument.type for argument in arguments])
        return self.b.call(get_or_insert_function(self.b.module, form, name), arguments)
