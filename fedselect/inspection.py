"""The checks of ``wire`` on a file that arrives piece by piece.

Owns the order in which a stream is judged: what ``wire.decode_update`` says of the same bytes, with
the memory of one block and the mask, whatever the file's size. Must not read files or sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedselect import wire
from fedselect.deltas import SCALE_BLOCK, Frames, check_scales, scale_counts
from fedselect.errors import WireError
from fedselect.layout import CODED_FORMAT, Layout, check_size, header_size
from fedselect.masks import BLOCK, Mask

VALUES_AT_ONCE = 4 * BLOCK  # bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """What a good update says: the mask that counts, whether it was sent, and the examples."""

    mask: Mask
    mask_sent: bool
    examples: int


class Values(Protocol):
    """Takes the values of a file as they pass."""

    def take(self, view: memoryview) -> int:
        """Look at the next bytes and say how many of them (at least one)."""

    def finish(self) -> None:
        """Judge what passed, all of it.

        Raises:
            WireError: with the code of what is wrong with a value.
        """


class PlainValues:
    """Float32 values, in blocks of ``BLOCK``."""

    def __init__(self, check: wire.ValueCheck) -> None:
        self._check = check
        self._block = bytearray()

    def take(self, view: memoryview) -> int:
        """As :class:`Values` says."""
        taken = min(len(view), VALUES_AT_ONCE - len(self._block))
        self._block += view[:taken]
        if len(self._block) == VALUES_AT_ONCE:
            self._add()
        return taken

    def finish(self) -> None:
        """As :class:`Values` says."""
        self._add()
        self._check.finish()

    def _add(self) -> None:
        self._check.add(np.frombuffer(bytes(self._block), dtype="<f4"))
        self._block.clear()


class FramedValues:
    """Deltas in frames, decoded one frame at a time: no more than that is ever held."""

    def __init__(self, frames: Frames, mask: Mask, check: wire.ValueCheck) -> None:
        self._frames, self._check = frames, check
        self._dim = mask.dim
        self._counts = scale_counts(mask.packed, mask.dim)
        self._start = 0  # first element of the frame under way
        self._frame = bytearray()

    def take(self, view: memoryview) -> int:
        """As :class:`Values` says."""
        self._decode()
        taken = min(len(view), self._wanted() - len(self._frame))
        self._frame += view[:taken]
        self._decode()
        return taken

    def finish(self) -> None:
        """As :class:`Values` says."""
        self._decode()
        self._check.finish()

    def _stop(self) -> int:
        return min(self._start + BLOCK, self._dim)

    def _wanted(self) -> int:
        first, last = self._frames.span(self._start, self._stop())
        return last - first

    def _decode(self) -> None:
        """Go on behind every frame that is complete, empty ones included."""
        while self._start < self._dim and len(self._frame) == self._wanted():
            start, stop = self._start, self._stop()
            codes = self._frames.decode(bytes(self._frame), start, stop)
            counts = self._counts[start // SCALE_BLOCK : -(-stop // SCALE_BLOCK)]
            check_scales(codes, counts)
            self._check.add(codes.values(counts))
            self._start = stop
            self._frame.clear()


Kept = Mapping[str, bytes]


class Stream:
    """A file of ``size`` bytes: its head, checked as soon as it is there, then its sections.

    ``read_head`` turns the head into a layout and refuses what it must not be. Small sections are
    kept; values only pass by what ``open_values`` makes of the layout and the sections before them.
    """

    def __init__(
        self,
        size: int,
        read_head: Callable[[bytes], Layout],
        open_values: Callable[[Layout, Kept], Values],
    ) -> None:
        self.layout: Layout | None = None
        self._kept: dict[str, bytearray] = {}
        self._values: Values | None = None
        self._size, self._seen = size, 0
        self._read_head = read_head
        self._open_values = open_values
        self._head = bytearray()

    @property
    def kept(self) -> dict[str, bytes]:
        """The bytes of every section but the values."""
        return {name: bytes(data) for name, data in self._kept.items()}

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            WireError: the head is refused, or there are more than ``size`` bytes.
        """
        if self._seen + len(data) > self._size:
            surplus = self._seen + len(data) - self._size
            raise WireError(f"{surplus} bytes too many", code="file_trailing")
        view = memoryview(data)
        while view:
            taken = self._feed_head(view) if self.layout is None else self._feed_section(view)
            view = view[taken:]

    def finish(self) -> tuple[Layout, Values]:
        """The layout and the values of a file that has come to its end; every section is complete.

        Raises:
            WireError: file_truncated.
        """
        if self.layout is None:
            self._read(bytes(self._head))
        if self.layout is None or self._seen < self._size:
            raise WireError(f"{self._seen} of {self._size} bytes", code="file_truncated")
        return self.layout, self._opened(self.layout)

    def _opened(self, layout: Layout) -> Values:
        if self._values is None:
            self._values = self._open_values(layout, self.kept)
        return self._values

    def _feed_head(self, view: memoryview) -> int:
        wanted = header_size(bytes(self._head[:8])) if len(self._head) >= 8 else 8
        taken = min(wanted - len(self._head), len(view))
        self._head += view[:taken]
        self._seen += taken
        if len(self._head) >= 8 and len(self._head) == header_size(bytes(self._head[:8])):
            self._read(bytes(self._head))
        return taken

    def _read(self, head: bytes) -> None:
        self.layout = self._read_head(head)

    def _feed_section(self, view: memoryview) -> int:
        if self.layout is None:
            raise RuntimeError("a section cannot come before the head")
        sections = self.layout.sections
        name, section = next((n, s) for n, s in sections.items() if s.stop > self._seen)
        piece = view[: section.stop - self._seen]
        if name == "values":
            taken = self._opened(self.layout).take(piece)
        else:
            taken = len(piece)
            self._kept.setdefault(name, bytearray()).extend(piece)
        self._seen += taken
        return taken


class UpdateInspection:
    """A client's update, against the plan of its assignment."""

    def __init__(self, plan: wire.UpdatePlan, size: int) -> None:
        self._plan = plan
        self._size = size
        self._examples = 0
        self._mask: Mask | None = None
        self._stream = Stream(size, self._read_head, self._open_values)

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            WireError: with the code of the first thing that is wrong so far.
        """
        self._stream.feed(data)

    def finish(self) -> Facts:
        """Judge the whole file.

        Raises:
            WireError: with the code of the first thing that is wrong, as ``wire.decode_update``.
        """
        layout, values = self._stream.finish()
        mask = self._mask or self._read_mask(layout, self._stream.kept)
        values.finish()
        return Facts(mask, "mask" in layout.sections, self._examples)

    def _read_head(self, head: bytes) -> Layout:
        layout = wire.read_update_layout(head)
        check_size(layout, self._size)
        self._examples = wire.check_update_head(layout, self._plan).examples
        return layout

    def _open_values(self, layout: Layout, kept: Kept) -> Values:
        plan = self._plan
        check = wire.ValueCheck(max_abs=plan.max_abs, max_norm=plan.max_norm)
        if plan.encoding == "f32" or layout.metadata["format"] != CODED_FORMAT:
            return PlainValues(check)  # its mask comes behind them
        self._mask = self._read_mask(layout, kept)
        frames = wire.check_frames(layout, self._mask, plan.encoding, kept.get("lengths", b""))
        return FramedValues(frames, self._mask, check)

    def _read_mask(self, layout: Layout, kept: Kept) -> Mask:
        sent = kept.get("mask", b"") if "mask" in layout.sections else None
        mask = wire.check_update_mask(layout, self._plan, sent=sent)
        wire.check_block_rank(kept.get("block_rank", b""), mask)
        return mask


class VersionInspection:
    """A file of a model's weights, against its parameter space."""

    def __init__(self, *, space_digest: str, dim: int, size: int) -> None:
        self._space, self._dim, self._size = space_digest, dim, size
        self._stream = Stream(size, self._read_head, lambda *_: PlainValues(wire.ValueCheck()))

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            WireError: with the code of the first thing that is wrong with the head.
        """
        self._stream.feed(data)

    def finish(self) -> None:
        """Judge the whole file.

        Raises:
            WireError: with the code of the first thing that is wrong, as ``wire.decode_version``.
        """
        self._stream.finish()[1].finish()

    def _read_head(self, head: bytes) -> Layout:
        layout = wire.read_version_layout(head)
        wire.check_version_head(layout, space_digest=self._space, dim=self._dim)
        check_size(layout, self._size)
        return layout
