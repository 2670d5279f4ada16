"""Rows of the aggregation in LLVM's own terms, because nothing above it can say "expand".

Owns the instructions: a row is four vectors of elements, summed over all clients of a group in
registers, so that the group's sum is formed without one intermediate store. Spreading compact
values over the lanes that share is one instruction with AVX-512, a permutation with AVX2, and is
done one by one elsewhere. Must not know what is summed, or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTORS = 4  # of a row
OVERREAD = 64  # bytes behind the last value that a row may read
PREFETCH = 4096  # bytes ahead in each client's values: a page, which no hardware prefetcher crosses

_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_BIT, _BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
# For AVX2: row m says which of the next compact values lane i takes when the sharing lanes are m.
_TAKEN = np.cumsum((np.arange(256)[:, None] >> np.arange(8)) & 1, axis=1)
_EIGHT = ir.VectorType(_INT, 8)
_ORDER = ir.Constant(
    ir.ArrayType(_EIGHT, 256), [_EIGHT([max(n - 1, 0) for n in row]) for row in _TAKEN.tolist()]
)
# By the lanes spread at once: the type of a row's mask, which says to compiled code what to use.
WORDS = {16: np.uint64, 8: np.uint32, 1: np.uint16}
_STORED = {
    types.float64: _DOUBLE,
    types.float32: _FLOAT,
    types.float16: _SHORT,
    types.uint16: _SHORT,
    types.int8: _BYTE,
}


def processor_lanes() -> int:
    """Elements that this processor spreads at once: 16 (AVX-512), 8 (AVX2) or 1."""
    has = binding.get_host_cpu_features().get
    if all(has(name) for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl")):
        return 16
    return 8 if has("avx2") and has("f16c") else 1


@intrinsic
def add_row(_, kind, word, clients, factors, where):  # type: ignore[no-untyped-def]
    """Sum one row over ``clients`` and add it to the running sums.

    ``clients``: how many, and where the addresses of their masks and of their next values stand;
    the latter go on. ``factors``: where a float64 for each client stands, its scale and its weight;
    0 for none. ``where``: the row's number, then the addresses of totals, counts and weight sums.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        clients, factors, where = (cgutils.unpack_tuple(builder, each) for each in arguments[2:])
        scales = factors[0] if kind.dtype == types.int8 else None
        weights = None if signature.args[3][1] == types.none else factors[1]
        emitter = _Emitter(builder, kind.dtype, word.dtype.bitwidth)
        emitter.row(clients, (scales, weights), where)
        return context.get_dummy_value()

    return types.void(kind, word, clients, factors, where), generate


@intrinsic
def row_width(_, word):  # type: ignore[no-untyped-def]
    """Elements of a row."""

    def generate(*_):  # type: ignore[no-untyped-def]
        return _LONG(word.dtype.bitwidth)

    return types.int64(word), generate


@intrinsic
def personal_in(_, address):  # type: ignore[no-untyped-def]
    """Personal elements among the 64 whose mask bytes begin at ``address``."""

    def generate(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(arguments[0], _LONG.as_pointer())
        return builder.ctpop(builder.load(place, align=1))

    return types.int64(address), generate


class _Emitter:
    """Writes the code of one row: ``width`` elements of every client of a group."""

    def __init__(self, builder: Any, kind: Any, width: int) -> None:
        self.b, self.kind, self.width = builder, kind, width
        self.lanes = width // VECTORS
        self.stored = _STORED[kind]
        self.size = kind.bitwidth // 8

    def row(self, clients: Sequence[Any], factors: Sequence[Any], where: Sequence[Any]) -> None:
        """The whole row: a loop over the clients, then one addition to the running sums."""
        many, masks, heads = clients
        scales, weights = factors
        index, *sums = where
        totals = [self._variable(self._vector(_DOUBLE)) for _ in range(VECTORS)]
        weighed = [self._variable(self._vector(_DOUBLE)) for _ in range(VECTORS if weights else 0)]
        count = self._variable(ir.VectorType(_BYTE, self.width))
        with cgutils.for_range(self.b, many) as loop:
            mask = self._item(masks, loop.index, _LONG)
            word = self.b.load(
                self._place(self.b.load(mask), index, ir.IntType(self.width)), align=1
            )
            bits = self.b.not_(word)
            shares = self.b.bitcast(bits, ir.VectorType(_BIT, self.width))
            one = self.b.sext(shares, count.type.pointee)
            self.b.store(self.b.sub(self.b.load(count), one), count)
            scale = None if scales is None else self._broadcast(scales, loop.index)
            weight = None if weights is None else self._broadcast(weights, loop.index)
            self._client(
                self._item(heads, loop.index, _LONG), bits, (scale, weight), (totals, weighed)
            )
        counted = self.b.zext(self.b.load(count), ir.VectorType(_INT, self.width))
        self._add(sums[1], index, counted, self.b.add)
        for number, found in ((0, totals), (2, weighed)):
            for vector, variable in enumerate(found):
                place = self.b.add(self.b.mul(index, _LONG(VECTORS)), _LONG(vector))
                self._add(sums[number], place, self.b.load(variable), self.b.fadd)

    def _client(
        self, head: Any, bits: Any, factors: tuple[Any, Any], sums: tuple[Any, Any]
    ) -> None:
        """Four vectors of one client; ``head`` is where the address of its next value stands."""
        scale, weight = factors
        totals, weighed = sums
        address = self.b.load(head)
        self._prefetch(address)
        for vector, total in enumerate(totals):
            part = ir.IntType(self.lanes)
            own = self.b.trunc(self.b.lshr(bits, bits.type(vector * self.lanes)), part)
            shares = self.b.bitcast(own, self._vector(_BIT))
            taken = self.b.zext(self.b.ctpop(self.b.zext(own, _INT)), _LONG)
            wide = self._wide(address, own, shares)
            if scale is not None:
                wide = self.b.fmul(wide, scale)
            if weight is not None:
                wide = self.b.fmul(wide, weight)
                one = self.b.select(shares, weight, self._zero(_DOUBLE))
                self.b.store(self.b.fadd(self.b.load(weighed[vector]), one), weighed[vector])
            self.b.store(self.b.fadd(self.b.load(total), wide), total)
            address = self.b.add(address, self.b.mul(taken, _LONG(self.size)))
        self.b.store(address, head)

    def _wide(self, address: Any, own: Any, shares: Any) -> Any:
        """The next values on the lanes that share, as float64, and 0.0 on the others."""
        if self.kind == types.float64:  # not a format of the wire, so no code of its own
            return self.b.select(shares, self._one_by_one(address, own), self._zero(_DOUBLE))
        return self.b.fpext(self._spread(address, own, shares), self._vector(_DOUBLE))

    def _spread(self, address: Any, own: Any, shares: Any) -> Any:
        """The next values on the lanes that share, as float32, and 0.0 on the others."""
        zero = self._zero(_FLOAT)
        if self.lanes == 4:
            return self.b.select(shares, self._number(self._one_by_one(address, own)), zero)
        compact = self._number(self._load(address, self._vector(self.stored)))
        if self.lanes == 16:
            name = "llvm.x86.avx512.mask.expand.v16f32"
            return self._call(name, compact.type, [compact, zero, shares])
        order = cgutils.global_constant(self.b, "order", _ORDER)
        place = self.b.gep(order, [_LONG(0), self.b.zext(own, _LONG)])
        row = self.b.load(place, align=4)
        placed = self._call("llvm.x86.avx2.permps", compact.type, [compact, row])
        return self.b.select(shares, placed, zero)

    def _one_by_one(self, address: Any, own: Any) -> Any:
        spread = self._zero(self.stored)
        for lane in range(self.lanes):
            value = self._load(address, self.stored)
            spread = self.b.insert_element(spread, value, _INT(lane))
            bit = self.b.and_(self.b.lshr(own, own.type(lane)), own.type(1))
            step = self.b.mul(self.b.zext(bit, _LONG), _LONG(self.size))
            address = self.b.add(address, step)
        return spread

    def _number(self, stored: Any) -> Any:
        """A vector as it is stored, as float32: exactly, whatever the format."""
        wide = self._vector(_INT)
        if self.kind == types.float32:
            return stored
        if self.kind == types.int8:
            return self.b.sitofp(stored, self._vector(_FLOAT))
        if self.kind == types.uint16:  # bfloat16 is the upper half of float32
            shifted = self.b.shl(self.b.zext(stored, wide), wide([16] * self.lanes))
            return self.b.bitcast(shifted, self._vector(_FLOAT))
        if self.lanes == 4:
            return self._half(self.b.zext(stored, wide))
        return self.b.fpext(
            self.b.bitcast(stored, self._vector(ir.HalfType())), self._vector(_FLOAT)
        )

    def _half(self, bits: Any) -> Any:
        """float16 by its bits, where a processor may not know the format: any finite value."""

        def same(value: int) -> Any:
            return bits.type([value] * self.lanes)

        floats = self._vector(_FLOAT)
        sign = self.b.shl(self.b.and_(bits, same(0x8000)), same(16))
        rest = self.b.and_(bits, same(0x7FFF))
        normal = self.b.add(self.b.shl(rest, same(13)), same(112 << 23))
        small = self.b.fmul(self.b.sitofp(rest, floats), floats([2.0**-24] * self.lanes))
        tiny = self.b.icmp_unsigned("<", rest, same(0x0400))
        size = self.b.select(tiny, self.b.bitcast(small, bits.type), normal)
        return self.b.bitcast(self.b.or_(sign, size), floats)

    def _prefetch(self, address: Any) -> None:
        read, keep, data = _INT(0), _INT(3), _INT(1)
        for ahead in range(PREFETCH, PREFETCH + self.width * self.size, 64):
            place = self.b.inttoptr(self.b.add(address, _LONG(ahead)), _BYTE.as_pointer())
            self._call("llvm.prefetch.p0", ir.VoidType(), [place, read, keep, data])

    def _broadcast(self, address: Any, index: Any) -> Any:
        scalar = self.b.load(self._item(address, index, _DOUBLE))
        single = self.b.insert_element(self._vector(_DOUBLE)(ir.Undefined), scalar, _INT(0))
        return self.b.shuffle_vector(single, single, self._vector(_INT)([0] * self.lanes))

    def _add(self, address: Any, index: Any, vector: Any, operation: Any) -> None:
        place = self._place(address, index, vector.type)
        align = 4 if vector.type.element == _INT else 8
        self.b.store(operation(self.b.load(place, align=align), vector), place, align=align)

    def _load(self, address: Any, kind: Any) -> Any:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=self.size)

    def _item(self, address: Any, index: Any, kind: Any) -> Any:
        return self._place(address, index, kind)

    def _place(self, address: Any, index: Any, kind: Any) -> Any:
        return self.b.gep(self.b.inttoptr(address, kind.as_pointer()), [index])

    def _variable(self, kind: Any) -> Any:
        return cgutils.alloca_once_value(self.b, ir.Constant(kind, [0] * kind.count))

    def _vector(self, element: Any) -> Any:
        return ir.VectorType(element, self.lanes)

    def _zero(self, element: Any) -> Any:
        return ir.Constant(self._vector(element), [0] * self.lanes)

    def _call(self, name: str, kind: Any, arguments: list[Any]) -> Any:
        form = ir.FunctionType(kind, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, form, name), arguments)
