"""The documents of uploading a file, in one piece or in parts (docs/UPLOADS.md).

Owns their shape and limits, like ``protocol`` does for all others. Must not know HTTP, rows or
storage.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self
from uuid import UUID

from pydantic import Field, model_validator

from fedselect.protocol import (
    MAX_PARTS,
    MAX_UPLOAD,
    MULTIPART_FROM,
    Answer,
    Md5,
    Request,
    Sha256,
    in_parts,
    part_sizes,
)
from fedselect.scalars import Whole


class UploadReserve(Request):
    """Announce a file; the signed addresses will admit exactly these lengths and contents.

    A file of ``MULTIPART_FROM`` bytes or more travels in parts, each with its own MD5, so that a
    cut connection costs one part (docs/UPLOADS.md).
    """

    size: Whole = Field(ge=1, le=MAX_UPLOAD, description="Bytes.")
    sha256: Sha256
    md5: Md5
    part_size: Whole | None = Field(None, description="Bytes of every part but the last.")
    parts: list[Md5] = Field(
        default=[], max_length=MAX_PARTS, description="MD5 of every part, in order."
    )

    @model_validator(mode="after")
    def _cut_as_agreed(self) -> Self:
        sizes = part_sizes(self.size) if in_parts(self.size) else []
        if (self.part_size, len(self.parts)) != (sizes[0] if sizes else None, len(sizes)):
            due = f"{len(sizes)} parts of {sizes[0]} bytes" if sizes else "no parts"
            raise ValueError(
                f"a file of {self.size} bytes is announced with part_size and the MD5 of every "
                f"part from {MULTIPART_FROM} bytes on, this one with {due}"
            )
        return self


class UploadTicket(Answer):
    """Where to PUT a file, with headers that must be sent exactly as given.

    Without ``url``, the file goes in parts: ask for their addresses.
    """

    id: UUID
    url: str | None = Field(repr=False)
    method: Literal["PUT"] = "PUT"
    headers: dict[str, str]
    expires_at: datetime


class PartAddress(Answer):
    """Where to PUT bytes [start, start + size) of a file; the headers are as in a ticket."""

    number: int = Field(description="From 1.")
    start: int
    size: int
    url: str = Field(repr=False)
    headers: dict[str, str]


class MissingParts(Answer):
    """The parts that the store does not have yet, as many of them as get an address at once.

    PUT them and ask again, until ``missing`` is 0: then say that the file is complete.
    """

    id: UUID
    missing: int
    parts: list[PartAddress]
    expires_at: datetime


class UploadStatus(Answer):
    """Where an upload stands; ``reason`` is a stable code, ``detail`` is for people."""

    id: UUID
    state: Literal["reserved", "uploaded", "accepted", "rejected", "late"]
    reason: str | None = None
    detail: str | None = None
