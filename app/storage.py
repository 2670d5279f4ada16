"""The object store behind one small port: bytes by key, in one piece or in parts.

Owns every S3 call. Must not know what the objects mean. Any S3 server works; the addresses that
clients get are signed for another endpoint if there is one (DESIGN §3, `app/signing.py`).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO, NoReturn, Protocol
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.datatypes import ListMultipartUploadsResult, Part
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error

from app.errors import Missing, Unavailable
from app.settings import AppSettings
from app.signing import Signer, pinned
from fedselect.encryption import Encryptor
from fedselect.protocol import MULTIPART_FROM, Download

CHUNK = 1024 * 1024
GONE = {"NoSuchKey", "NoSuchBucket", "NotFound"}  # what stores call an object that is not there
BEYOND = {"InvalidRange", "InvalidArgument"}  # and a range that ends behind the object
Query = dict[str, str | list[str] | tuple[str]]
BEGINNING = datetime.min.replace(tzinfo=UTC)  # of what a store does not date


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as the store lists it."""

    key: str
    size: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part of a multipart upload that has arrived."""

    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class IncompleteMultipart:
    """A multipart upload that was neither completed nor aborted."""

    key: str
    upload_id: str
    initiated: datetime


class Storage(Protocol):
    """What the service needs of an object store. Every verb raises Unavailable."""

    def put(self, key: str, stream: BinaryIO, size: int) -> None:
        """Write an object of exactly ``size`` bytes."""

    def read(self, key: str, start: int = 0, length: int = 0) -> bytes:
        """Read a range, cut off at the end; ``length`` 0 means all that follows. Raises Missing."""

    def stream(self, key: str) -> Iterator[bytes]:
        """Read an object piece by piece. Raises Missing."""

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if it is not there."""

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        """The objects below a prefix."""

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; keys that are not there do not matter."""

    def create_multipart(self, key: str) -> str:
        """Begin an object in parts; returns the store's id of this upload."""

    def put_part(self, key: str, upload_id: str, number: int, data: bytes) -> str:
        """Write a part, numbered from 1; returns its etag. Raises Missing."""

    def list_parts(self, key: str, upload_id: str) -> dict[int, StoredPart]:
        """The parts that have arrived, by number. Raises Missing."""

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[tuple[int, str]]
    ) -> None:
        """Make the object of these parts, as (number, etag) in order. Raises Missing."""

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Forget an upload and its parts; one that is not there does not matter."""

    def multiparts(self, prefix: str) -> Iterator[IncompleteMultipart]:
        """The incomplete multipart uploads of keys below a prefix."""

    def sign_put(
        self, key: str, *, size: int, md5: str, until: datetime
    ) -> tuple[str, dict[str, str]]:
        """A signed PUT address for exactly this length and content, and the headers to send."""

    def sign_part(
        self, key: str, upload_id: str, *, number: int, size: int, md5: str, until: datetime
    ) -> tuple[str, dict[str, str]]:
        """The same for one part of a multipart upload."""

    def sign_get(self, key: str, *, sha256: str, size: int, until: datetime) -> Download:
        """A signed GET address."""

    def encryptor(self, key: str) -> Encryptor | None:
        """What makes the stored bytes of an object, if they are not the plain ones; who writes in
        parts writes what it gives.
        """

    def ping(self) -> None:
        """Raises Unavailable unless the bucket answers."""


class S3Storage:
    """The port over any S3 server: the minio SDK for operations, our signer for addresses.

    The SDK's calls for single parts begin with an underscore; tests/store/ holds them to their
    behaviour on three servers.
    """

    def __init__(self, settings: AppSettings) -> None:
        self._bucket = settings.s3_bucket
        self._signer = Signer.of(settings, settings.public_s3_endpoint)
        endpoint = urlsplit(settings.s3_endpoint)
        self._minio = Minio(
            endpoint.netloc,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            secure=endpoint.scheme == "https",
            region=settings.s3_region,
            http_client=_Pool(
                timeout=urllib3.Timeout(connect=3, read=settings.s3_timeout),
                # A store may stumble (rclone over a folder that two calls make at once): ask again.
                retries=urllib3.Retry(
                    total=2,
                    read=1,
                    backoff_factor=0.2,
                    status_forcelist=(500, 502, 503, 504),
                    raise_on_status=False,
                ),
                maxsize=32,
            ),
        )

    @property
    def stored(self) -> S3Storage:
        """The store as it is, whatever encrypts on the way to it (``app.encrypted``)."""
        return self

    def encryptor(self, key: str) -> Encryptor | None:  # noqa: ARG002
        """Nothing: what is written here is stored as it is."""
        return None

    def prepare(self) -> None:
        """Create the bucket if it is not there."""
        with _translated(self._bucket):
            if not self._minio.bucket_exists(self._bucket):
                self._minio.make_bucket(self._bucket)

    def ping(self) -> None:
        """Raises Unavailable unless the bucket answers."""
        with _translated(self._bucket):
            if not self._minio.bucket_exists(self._bucket):
                raise Unavailable(f"the bucket {self._bucket!r} does not exist")

    # --- whole objects ---

    def put(self, key: str, stream: BinaryIO, size: int) -> None:
        """Write an object of exactly ``size`` bytes."""
        with _translated(key):
            self._minio.put_object(self._bucket, key, stream, size, part_size=MULTIPART_FROM)

    def read(self, key: str, start: int = 0, length: int = 0) -> bytes:
        """Read a range, cut off at the object's end; ``length`` 0 means all that follows."""
        with _translated(key):
            try:
                return self._range(key, start, length)
            except S3Error as error:
                if error.code not in BEYOND:
                    raise
            # Nothing starts behind the end; nanio refuses a range that only ends there, too.
            left = (self._minio.stat_object(self._bucket, key).size or 0) - start
            return self._range(key, start, min(length or left, left)) if left > 0 else b""

    def _range(self, key: str, start: int, length: int) -> bytes:
        answer = self._minio.get_object(self._bucket, key, offset=start, length=length)
        try:
            # Some stores answer a range with status 200, but with the right bytes (rclone).
            return bytes(answer.read())
        finally:
            answer.close()
            answer.release_conn()

    def stream(self, key: str) -> Iterator[bytes]:
        """Read an object piece by piece."""
        with _translated(key):
            answer = self._minio.get_object(self._bucket, key)
            try:
                yield from answer.stream(CHUNK)
            finally:
                answer.close()
                answer.release_conn()

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if it is not there."""
        with suppress(Missing), _translated(key):
            return self._minio.stat_object(self._bucket, key).size
        return None

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        """The objects below a prefix."""
        with _translated(prefix):
            for found in self._minio.list_objects(self._bucket, prefix=prefix, recursive=True):
                # Stores over a file system may list the folders that deleted objects have left.
                if found.object_name and not found.is_dir:
                    modified = found.last_modified or BEGINNING
                    yield StoredObject(found.object_name, found.size or 0, modified)

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix."""
        return (entry.key for entry in self.entries(prefix))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; keys that are not there do not matter."""
        with _translated(", ".join(keys[:1])):
            doomed = [DeleteObject(key) for key in keys]
            for failure in self._minio.remove_objects(self._bucket, doomed):
                if failure.code not in GONE:
                    raise Unavailable(f"{failure.name} was not deleted: {failure.code}")

    # --- objects in parts ---

    def create_multipart(self, key: str) -> str:
        """Begin an object in parts; returns the store's id of this upload."""
        with _translated(key):
            return self._minio._create_multipart_upload(self._bucket, key, {})

    def put_part(self, key: str, upload_id: str, number: int, data: bytes) -> str:
        """Write a part, numbered from 1; returns its etag."""
        with _translated(key):
            return self._minio._upload_part(self._bucket, key, data, None, upload_id, number)

    def list_parts(self, key: str, upload_id: str) -> dict[int, StoredPart]:
        """The parts that have arrived, by number."""
        found: dict[int, StoredPart] = {}
        marker: str | None = None
        with _translated(key):
            while True:
                page = self._minio._list_parts(
                    self._bucket, key, upload_id, part_number_marker=marker
                )
                found |= {p.part_number: StoredPart(p.size or 0, p.etag) for p in page.parts}
                if not page.is_truncated or page.next_part_number_marker in (None, marker):
                    return found
                marker = page.next_part_number_marker

    def complete_multipart(
        self, key: str, upload_id: str, parts: Sequence[tuple[int, str]]
    ) -> None:
        """Make the object of these parts, as (number, etag) in order."""
        chosen = [Part(number, etag) for number, etag in parts]
        with _translated(key):
            done = self._minio._complete_multipart_upload(self._bucket, key, upload_id, chosen)
            if not done.etag:  # S3 may begin its answer with 200 and fail after that
                raise Unavailable(f"the parts of {key} were not put together")

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Forget an upload and its parts; one that is not there does not matter."""
        with suppress(Missing), _translated(key):
            self._minio._abort_multipart_upload(self._bucket, key, upload_id)

    def multiparts(self, prefix: str) -> Iterator[IncompleteMultipart]:
        """The incomplete multipart uploads of keys below a prefix."""
        marker = ""
        with _nothing_listed(), _translated(prefix):
            while True:
                # Not the SDK's own call: its empty delimiter makes rclone fold all keys away.
                query: Query = {"uploads": "", "prefix": prefix, "key-marker": marker}
                answer = self._minio._execute("GET", self._bucket, query_params=query)
                page = ListMultipartUploadsResult(answer)
                ours = (u for u in page.uploads if u.object_name.startswith(prefix))  # nanio: all
                for found in ours:
                    begun = found.initiated_time or BEGINNING
                    yield IncompleteMultipart(found.object_name, found.upload_id or "", begun)
                if not page.is_truncated or page.next_key_marker in (None, marker):
                    return
                marker = page.next_key_marker

    # --- signed addresses ---

    def sign_put(
        self, key: str, *, size: int, md5: str, until: datetime
    ) -> tuple[str, dict[str, str]]:
        """A signed PUT address for exactly this length and content, and the headers to send."""
        headers = pinned(size, md5)
        return self._signer.sign("PUT", key, until=until, headers=headers), headers

    def sign_part(
        self, key: str, upload_id: str, *, number: int, size: int, md5: str, until: datetime
    ) -> tuple[str, dict[str, str]]:
        """The same for one part of a multipart upload."""
        headers = pinned(size, md5)
        query = {"partNumber": str(number), "uploadId": upload_id}
        return self._signer.sign("PUT", key, until=until, headers=headers, query=query), headers

    def sign_get(self, key: str, *, sha256: str, size: int, until: datetime) -> Download:
        """A signed GET address."""
        url = self._signer.sign("GET", key, until=until)
        return Download(url=url, sha256=sha256, size=size, expires_at=until)


class _Pool(urllib3.PoolManager):
    """Connections to the store; the SDK believes errors only in ``application/xml``."""

    def urlopen(  # type: ignore[override]  # as urllib3 itself says of this method
        self, method: str, url: str, redirect: bool = True, **options: Any
    ) -> urllib3.BaseHTTPResponse:
        answer = super().urlopen(method, url, redirect, **options)
        kind, semicolon, rest = answer.headers.get("content-type", "").partition(";")
        if kind == "text/xml":  # rclone's
            answer.headers["content-type"] = f"application/xml{semicolon}{rest}"
        return answer


@contextmanager
def _nothing_listed() -> Iterator[None]:
    """Let rclone answer NoSuchUpload when the last one goes away while it lists."""
    try:
        yield
    except Missing as error:
        if error.code != "multipart_missing":
            raise


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if error.code == "NoSuchUpload":
            text = f"the store knows no such multipart upload of {key}"
            raise Missing(text, code="multipart_missing") from error
        if error.code in GONE:
            raise Missing(f"object {key} is not in the store", code="object_missing") from error
        _unavailable(error)
    # An answer that is no S3 document is how a proxy in between says that the store is away.
    except (MinioException, urllib3.exceptions.HTTPError, OSError, ET.ParseError) as error:
        _unavailable(error)


def _unavailable(error: Exception) -> NoReturn:
    said = error.code if isinstance(error, S3Error) else type(error).__name__
    raise Unavailable(
        f"the object store does not answer as it should ({said})", code="storage_unavailable"
    ) from error
