"""The storage port keeps its promises on every S3 server: one suite, three makers."""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from itertools import accumulate

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import Missing, Unavailable
from app.settings import AppSettings
from app.storage import S3Storage, StoredPart
from fedselect.protocol import MAX_PARTS, MAX_UPLOAD, MULTIPART_FROM, PART_SIZE, part_sizes

MIB = 1024**2
SMALLEST = 5 * MIB  # of all parts but the last


def soon() -> datetime:
    return datetime.now(UTC) + timedelta(minutes=5)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def write(storage: S3Storage, key: str, data: bytes) -> None:
    storage.put(key, io.BytesIO(data), len(data))


def send(address: tuple[str, Mapping[str, str]], data: bytes) -> int:
    """PUT with a signed address as an agent does; ``verify`` would read the CA bundle."""
    url, headers = address
    return httpx.put(url, headers=dict(headers), content=data, verify=False).status_code


# --- whole objects -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 70_000, MULTIPART_FROM + 1])
def test_an_object_is_read_as_it_was_written(storage: S3Storage, folder: str, size: int) -> None:
    data = secrets.token_bytes(size)
    write(storage, f"{folder}/a", data)
    assert storage.size(f"{folder}/a") == size
    assert storage.read(f"{folder}/a") == data
    assert b"".join(storage.stream(f"{folder}/a")) == data
    if size > 10:
        assert storage.read(f"{folder}/a", 3, 5) == data[3:8]
        assert storage.read(f"{folder}/a", size - 4) == data[-4:]
        assert storage.read(f"{folder}/a", size - 4, 100) == data[-4:], "cut off at the end"
        assert storage.read(f"{folder}/a", 0, size + 1) == data
        assert storage.read(f"{folder}/a", size, 3) == b""
    storage.delete([f"{folder}/a"])


def test_writing_again_replaces_the_object(storage: S3Storage, folder: str) -> None:
    write(storage, f"{folder}/a", b"first and longer")
    write(storage, f"{folder}/a", b"second")
    assert storage.read(f"{folder}/a") == b"second"


def test_what_is_not_there_is_missing(storage: S3Storage, folder: str) -> None:
    assert storage.size(f"{folder}/a") is None
    for read in (storage.read, lambda key: list(storage.stream(key))):
        with pytest.raises(Missing) as refusal:
            read(f"{folder}/a")
        assert refusal.value.code == "object_missing"
    assert list(storage.entries(folder)) == []


def test_many_objects_are_listed_and_deleted(storage: S3Storage, folder: str) -> None:
    """More than one page of a listing and one request of deletions would take is in soak."""
    sizes = {f"{folder}/{n:03}/{n}": n for n in range(1, 41)}
    for key, size in sizes.items():
        write(storage, key, bytes(size))
    before = datetime.now(UTC)
    found = list(storage.entries(f"{folder}/"))
    assert {entry.key: entry.size for entry in found} == sizes
    assert all(abs(entry.modified - before) < timedelta(minutes=1) for entry in found)
    assert list(storage.keys(f"{folder}/007/")) == [f"{folder}/007/7"]
    storage.delete([*sizes, f"{folder}/never-was"])
    assert list(storage.keys(folder)) == []
    storage.delete([])


# --- objects in parts --------------------------------------------------------------------------


def test_parts_become_one_object(storage: S3Storage, folder: str) -> None:
    """Parts may come in any order and be sent again; the list says which are there."""
    key = f"{folder}/a"
    parts = {1: secrets.token_bytes(SMALLEST), 2: secrets.token_bytes(SMALLEST), 3: b"the rest"}
    upload = storage.create_multipart(key)
    assert storage.list_parts(key, upload) == {}
    assert storage.size(key) is None, "nothing is there before it is complete"
    storage.put_part(key, upload, 3, b"an earlier try")
    etags = {n: storage.put_part(key, upload, n, parts[n]) for n in (3, 1, 2)}
    expected = {n: StoredPart(len(parts[n]), etags[n]) for n in (1, 2, 3)}
    assert storage.list_parts(key, upload) == expected
    storage.complete_multipart(key, upload, [(n, etags[n]) for n in (1, 2, 3)])
    assert b"".join(storage.stream(key)) == b"".join(parts.values())
    start = SMALLEST - 2
    assert storage.read(key, start, 4) == parts[1][-2:] + parts[2][:2]
    storage.delete([key])


def test_signed_parts_resume(storage: S3Storage, folder: str) -> None:
    """What an agent does after a cut: the list of parts says what is still to be sent."""
    key = f"{folder}/a"
    data = secrets.token_bytes(2 * SMALLEST + 11)
    pieces = [data[:SMALLEST], data[SMALLEST : 2 * SMALLEST], data[2 * SMALLEST :]]
    upload = storage.create_multipart(key)

    def address(number: int) -> tuple[str, dict[str, str]]:
        piece = pieces[number - 1]
        return storage.sign_part(
            key, upload, number=number, size=len(piece), md5=md5(piece), until=soon()
        )

    assert send(address(2), pieces[1]) == 200
    missing = {1, 2, 3} - set(storage.list_parts(key, upload))
    assert missing == {1, 3}
    for number in missing:
        assert send(address(number), pieces[number - 1]) == 200
    arrived = storage.list_parts(key, upload)
    storage.complete_multipart(key, upload, [(n, arrived[n].etag) for n in (1, 2, 3)])
    assert storage.read(key) == data
    storage.delete([key])


def test_an_incomplete_upload_is_found_and_aborted(storage: S3Storage, folder: str) -> None:
    keys = {f"{folder}/{name}" for name in "ab"}
    uploads = {storage.create_multipart(key): key for key in keys}
    storage.create_multipart(f"staging/other-{secrets.token_hex(8)}")
    found = list(storage.multiparts(f"{folder}/"))
    assert {each.upload_id: each.key for each in found} == uploads
    for each in found:
        assert abs(each.initiated - datetime.now(UTC)) < timedelta(minutes=1)
        storage.put_part(each.key, each.upload_id, 1, b"part")
        storage.abort_multipart(each.key, each.upload_id)
        storage.abort_multipart(each.key, each.upload_id)
        with pytest.raises(Missing) as refusal:
            storage.list_parts(each.key, each.upload_id)
        assert refusal.value.code == "multipart_missing"
    assert list(storage.multiparts(f"{folder}/")) == []
    assert list(storage.keys(folder)) == []


def test_an_upload_that_is_over_takes_nothing(storage: S3Storage, folder: str) -> None:
    key = f"{folder}/a"
    upload = storage.create_multipart(key)
    etag = storage.put_part(key, upload, 1, b"all of it")
    storage.complete_multipart(key, upload, [(1, etag)])
    for late in (
        lambda: storage.put_part(key, upload, 1, b"something else"),
        lambda: storage.complete_multipart(key, upload, [(1, etag)]),
        lambda: storage.list_parts(key, upload),
    ):
        with pytest.raises(Missing) as refusal:
            late()
        assert refusal.value.code == "multipart_missing"
    address = storage.sign_part(key, upload, number=1, size=4, md5=md5(b"evil"), until=soon())
    assert send(address, b"evil") == 404
    assert storage.read(key) == b"all of it"


def test_parts_that_never_came_cannot_be_put_together(storage: S3Storage, folder: str) -> None:
    key = f"{folder}/a"
    upload = storage.create_multipart(key)
    storage.put_part(key, upload, 1, b"part")
    with pytest.raises((Missing, Unavailable)):
        storage.complete_multipart(key, upload, [(1, md5(b"another")), (2, md5(b"none"))])
    assert storage.size(key) is None
    storage.abort_multipart(key, upload)


# --- errors ------------------------------------------------------------------------------------


def test_a_store_that_is_away_is_unavailable(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at this port: a vendor's error must not come through."""
    for name, value in (environment | {"S3_ENDPOINT": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    away = S3Storage(AppSettings())
    for verb in (lambda: away.create_multipart("staging/a"), lambda: away.size("staging/a")):
        with pytest.raises(Unavailable) as refusal:
            verb()
        assert refusal.value.code == "storage_unavailable"


# --- the plan of parts -------------------------------------------------------------------------


@given(st.integers(1, 20_000 * MIB))
def test_the_parts_of_a_file_are_a_plan_that_every_store_takes(size: int) -> None:
    parts = part_sizes(size)
    assert sum(parts) == size
    assert len(parts) <= MAX_PARTS
    assert len(set(parts[:-1])) <= 1, "all but the last are equal"
    assert 0 < parts[-1] <= parts[0]
    if len(parts) > 1:
        assert parts[0] >= PART_SIZE
    offsets = [0, *accumulate(parts)]
    assert offsets[-1] == size


def test_parts_have_their_usual_size_up_to_the_largest_upload() -> None:
    assert part_sizes(MULTIPART_FROM) == [PART_SIZE, PART_SIZE]
    assert set(part_sizes(MAX_UPLOAD)) == {PART_SIZE}
    with pytest.raises(ValueError, match="0 bytes"):
        part_sizes(0)
