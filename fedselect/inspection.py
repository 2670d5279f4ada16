"""The checks of ``wire`` on a file that arrives piece by piece.

Owns the order in which a stream is judged: what ``wire.decode_update`` says of the same bytes, with
the memory of one block and the mask, whatever the file's size. Must not read files or sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedselect import wire
from fedselect.errors import WireError
from fedselect.layout import Layout, check_size, header_size
from fedselect.masks import BLOCK, Mask

VALUES_AT_ONCE = 4 * BLOCK  # bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """What a good update says: the mask that counts, whether it was sent, and the examples."""

    mask: Mask
    mask_sent: bool
    examples: int


class Stream:
    """A file of ``size`` bytes: its head, checked as soon as it is there, then its sections.

    ``read_head`` turns the head into a layout and refuses what it must not be. Small sections are
    kept, values only pass by.
    """

    def __init__(
        self, size: int, read_head: Callable[[bytes], Layout], values: wire.ValueCheck
    ) -> None:
        self.layout: Layout | None = None
        self.kept: dict[str, bytearray] = {}
        self.values = values
        self._size, self._seen = size, 0
        self._read_head = read_head
        self._head = bytearray()
        self._block = bytearray()

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

    def finish(self) -> Layout:
        """The layout of a file that has come to its end; every section is complete.

        Raises:
            WireError: file_truncated.
        """
        if self.layout is None:
            self._read(bytes(self._head))
        if self.layout is None or self._seen < self._size:
            raise WireError(f"{self._seen} of {self._size} bytes", code="file_truncated")
        return self.layout

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
        sections = self.layout.sections if self.layout else {}
        name, section = next((n, s) for n, s in sections.items() if s.stop > self._seen)
        taken = min(section.stop - self._seen, len(view))
        if name == "values":
            taken = min(taken, VALUES_AT_ONCE - len(self._block))
            self._block += view[:taken]
        else:
            self.kept.setdefault(name, bytearray()).extend(view[:taken])
        self._seen += taken
        ended = name == "values" and self._seen == section.stop
        if ended or len(self._block) == VALUES_AT_ONCE:
            self.values.add(np.frombuffer(bytes(self._block), dtype="<f4"))
            self._block.clear()
        return taken


class UpdateInspection:
    """A client's update, against the plan of its assignment."""

    def __init__(self, plan: wire.UpdatePlan, size: int) -> None:
        self._plan = plan
        self._size = size
        self._examples = 0
        values = wire.ValueCheck(max_abs=plan.max_abs, max_norm=plan.max_norm)
        self._stream = Stream(size, self._read_head, values)

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            WireError: with the code of the first thing that is wrong with the head.
        """
        self._stream.feed(data)

    def finish(self) -> Facts:
        """Judge the whole file.

        Raises:
            WireError: with the code of the first thing that is wrong, as ``wire.decode_update``.
        """
        layout = self._stream.finish()
        kept = {name: bytes(data) for name, data in self._stream.kept.items()}
        sent = kept.get("mask", b"") if "mask" in layout.sections else None
        mask = wire.check_update_mask(layout, self._plan, sent=sent)
        wire.check_block_rank(kept.get("block_rank", b""), mask)
        self._stream.values.finish()
        return Facts(mask, sent is not None, self._examples)

    def _read_head(self, head: bytes) -> Layout:
        layout = wire.read_update_layout(head)
        check_size(layout, self._size)
        self._examples = wire.check_update_head(layout, self._plan).examples
        return layout


class VersionInspection:
    """A file of a model's weights, against its parameter space."""

    def __init__(self, *, space_digest: str, dim: int, size: int) -> None:
        self._space, self._dim, self._size = space_digest, dim, size
        self._stream = Stream(size, self._read_head, wire.ValueCheck())

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
        self._stream.finish()
        self._stream.values.finish()

    def _read_head(self, head: bytes) -> Layout:
        layout = wire.read_version_layout(head)
        wire.check_version_head(layout, space_digest=self._space, dim=self._dim)
        check_size(layout, self._size)
        return layout
