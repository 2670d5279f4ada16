"""Data frames out of R's files, without R: .rda files and the lazy-load data bases of packages.

Owns the containers; the serialization itself is read by the library ``rdata``, a parser that runs
nothing. Must not know any data set.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from fedselect.errors import FedSelectError

Frame = dict[str, npt.NDArray[Any]]
_MAGIC = {".rda": (b"RDX2\nX\n", b"RDX3\nX\n"), ".rds": (b"X\n",)}
_DAMAGED: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError),
    *(NotImplementedError, RecursionError, TypeError, ValueError, struct.error),
)
_PACKED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}


def frame_of_rda(data: bytes, name: str) -> Frame:
    """A data frame that was saved with ``save``: its columns by name, factors as codes from 0.

    Raises:
        FedSelectError: ``data_invalid``, not such a file; ``data_missing``, rdata is not installed.
    """
    return _columns(_read(_unpacked(data), ".rda"), name)


def frame_of_database(index: bytes, content: bytes, name: str) -> Frame:
    """A data frame of a package's lazy-load data base (``Rdata.rdx`` and ``Rdata.rdb``).

    The index says where each serialized object lies: four bytes with its length when unpacked,
    the most significant first, and its zlib stream.

    Raises:
        FedSelectError: as :func:`frame_of_rda`.
    """
    try:
        places = _read(_unpacked(index), ".rds")["variables"]
        start, size = (int(number) for number in places[name])
        packed = content[start : start + size]
        data = zlib.decompress(packed[4:])
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise _error(f"no data frame {name} in this data base: {error}") from error
    if len(packed) != size or int.from_bytes(packed[:4]) != len(data):
        raise _error(f"the data base is cut at {name}")
    return _columns({name: _read(data, ".rds")}, name)


def _unpacked(data: bytes) -> bytes:
    try:
        return next((un(data) for head, un in _PACKED.items() if data.startswith(head)), data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _error(f"this R file cannot be unpacked: {error}") from error


def _read(data: bytes, extension: str) -> Any:
    try:
        from rdata.conversion import convert
        from rdata.parser import parse_data
    except ImportError as error:
        raise FedSelectError(
            "R's files are read with the package rdata: pip install 'fedselect[data]'",
            code="data_missing",
        ) from error
    if not data.startswith(_MAGIC[extension]):
        raise _error(f"this is no {extension} file in R's binary form")
    try:
        return convert(parse_data(data, extension=extension), default_encoding="utf-8")
    except _DAMAGED as error:
        raise _error(f"this is not an R file that can be read: {error}") from error


def _columns(objects: Any, name: str) -> Frame:
    try:
        table = objects[name]
        columns = {str(column): table[column] for column in table.columns}
    except (KeyError, TypeError, AttributeError) as error:
        raise _error(f"the R file holds no data frame {name}") from error
    return {
        column: np.asarray(values.cat.codes if hasattr(values, "cat") else values)
        for column, values in columns.items()
    }


def _error(text: str) -> FedSelectError:
    return FedSelectError(text, code="data_invalid")
