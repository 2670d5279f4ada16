"""Single files out of packages: a folder, .deb, .tar.gz, .whl or .zip, read without unpacking.

Owns the containers alone. Must not know what the files mean. Nothing is written to disk, no name
in an archive becomes a path, and a file above ``MOST`` bytes is refused.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from fedselect.errors import FedSelectError

MOST = 256 * 2**20  # bytes of one file
_AR, _AR_HEAD = b"!<arch>\n", 60


def members(source: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The files whose path in the package ends so, by that ending.

    Raises:
        FedSelectError: ``data_missing``, a file is not there; ``data_invalid``, not an archive.
    """
    names = tuple(wanted)
    try:
        found = _from_folder(source, names) if source.is_dir() else _from_archive(source, names)
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FedSelectError(f"{source} cannot be read: {error}", code="data_invalid") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise FedSelectError(f"{source} has no {', '.join(missing)}", code="data_missing")
    return found


def _from_folder(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Below the folder as in the package, or right in it."""
    found = {}
    for name in names:
        paths = sorted(p for p in folder.rglob(Path(name).name) if p.is_file())
        fitting = [p for p in paths if _ending(p.relative_to(folder).as_posix(), (name,))]
        for path in (fitting or [p for p in paths if p.parent == folder])[:1]:
            found[name] = _whole(path.open("rb"), path.name)
    return found


def _from_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            paths = {entry: _ending(entry, names) for entry in archive.namelist()}
            return {n: _whole(archive.open(p), p) for p, n in paths.items() if n is not None}
    with path.open("rb") as file:
        inner = _data_of_deb(file) if file.read(len(_AR)) == _AR else file
        inner.seek(0)
        with tarfile.open(fileobj=inner, mode="r:*") as archive:
            return _from_tar(archive, names)


def _from_tar(archive: tarfile.TarFile, names: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for entry in archive:
        name = _ending(entry.name, names) if entry.isfile() else None
        content = None if name is None else archive.extractfile(entry)
        if name is not None and content is not None:
            found[name] = _whole(content, entry.name)
    return found


def _ending(path: str, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if f"/{path}".endswith(f"/{name}")), None)


def _whole(file: IO[bytes], name: str) -> bytes:
    with file:
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise ValueError(f"{name} has more than {MOST} bytes")
    return data


def _data_of_deb(file: IO[bytes]) -> IO[bytes]:
    """The tar of a Debian package: an ar archive, each entry a head of 60 bytes and its content,
    padded to an even length (deb(5)).
    """
    while head := file.read(_AR_HEAD):
        size = int(head[48:58])
        content = file.read(size + size % 2)[:size]
        if head[:9] == b"data.tar." or head[:8] == b"data.tar":
            return io.BytesIO(content)
    raise ValueError("it is a .deb without data")
