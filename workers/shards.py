"""Reading a range of elements out of stored files.

Owns where the bytes of a range lie in an update, a mask and a version. The head of a large update
is read once by a process and kept: a key below ``accepted/`` never holds other bytes. Must not add
anything up.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from app.storage import Storage
from fedselect import wire
from fedselect.aggregate import value_range
from fedselect.deltas import Frames, delta_encoding
from fedselect.kernels import Part
from fedselect.layout import Layout
from fedselect.manifestdocs import ManifestUpdate
from fedselect.space import FloatVector

FIRST_READ = 64 * 1024  # covers the head and the tables of all but very large files
MOST = 512  # heads that are kept; their tables have a few bytes for every 65,536 elements


class Head(NamedTuple):
    """The beginning of an update file: its layout, and the tables that say what lies where."""

    layout: Layout
    rank: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32] | None  # of the frames of a delta file


_heads: OrderedDict[str, Head] = OrderedDict()


def read_update(storage: Storage, update: ManifestUpdate, start: int, stop: int) -> Part:
    """The mask, the shared values and the weight of elements [start, stop) of an accepted update.

    Of a delta file, the codes of the deltas as they are, with their scales.

    Raises:
        Missing: a file is not there (any more).
    """
    length = -(-stop // 8) - start // 8
    packed = np.frombuffer(storage.read(update.mask_object, start // 8, length), dtype=np.uint8)
    head, begun = _head(storage, update.object)
    offset = head.layout.sections["values"].start
    if head.lengths is None:
        first, last = value_range(head.rank, start, stop)
        data = _range(storage, update.object, begun, offset + 4 * first, offset + 4 * last)
        return Part(packed, np.frombuffer(data, dtype="<f4"), update.weight)
    encoding = delta_encoding(head.layout.metadata["encoding"])
    frames = Frames(encoding, wire.elements_of(head.layout), head.rank, head.lengths)
    first, last = frames.span(start, stop)
    data = _range(storage, update.object, begun, offset + first, offset + last)
    codes = frames.decode(data, start, stop)
    scales = codes.scales if encoding == "int8" else None
    return Part(packed, codes.codes, update.weight, scales)


def read_base(storage: Storage, key: str, start: int, stop: int) -> FloatVector:
    """The values of elements [start, stop) of the version file at ``key``."""
    begun = storage.read(key, 0, FIRST_READ)
    offset = wire.read_version_layout(begun).sections["values"].start
    data = _range(storage, key, begun, offset + 4 * start, offset + 4 * stop)
    return np.frombuffer(data, dtype="<f4")


def _head(storage: Storage, key: str) -> tuple[Head, bytes]:
    """A file's head, and the bytes that had to be read for it just now."""
    if key in _heads:
        _heads.move_to_end(key)
        return _heads[key], b""
    begun = storage.read(key, 0, FIRST_READ)
    layout = wire.read_update_layout(begun)
    coded = layout.metadata["format"] == wire.CODED_FORMAT
    rank, lengths = (
        layout.sections["block_rank"],
        layout.sections["lengths" if coded else "block_rank"],
    )
    if lengths.stop > len(begun):
        begun += storage.read(key, len(begun), lengths.stop - len(begun))
    head = Head(
        layout,
        np.frombuffer(begun[rank.start : rank.stop], dtype="<u8"),
        np.frombuffer(begun[lengths.start : lengths.stop], dtype="<u4") if coded else None,
    )
    if layout.size > len(begun):  # of a smaller file everything has been read
        _heads[key] = head
        if len(_heads) > MOST:
            _heads.popitem(last=False)
    return head, begun


def _range(storage: Storage, key: str, begun: bytes, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object whose beginning may be known already."""
    if stop <= len(begun):
        return begun[start:stop]
    return storage.read(key, start, stop - start) if stop > start else b""
