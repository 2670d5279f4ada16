"""The object store behind one small port: bytes by key, and signed addresses.

Owns every S3 call and the SigV4 signing that pins length and content. Must not know what the
objects mean. Any S3 server works; the two endpoints may differ (DESIGN §3).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import BinaryIO, NoReturn, Protocol
from urllib.parse import urlsplit

import urllib3
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error

from app.errors import Missing, Unavailable
from app.settings import AppSettings
from fedselect.protocol import Download

CHUNK = 1024 * 1024


class Storage(Protocol):
    """What the service needs of an object store."""

    def put(self, key: str, stream: BinaryIO, size: int) -> None:
        """Write an object of exactly ``size`` bytes."""

    def read(self, key: str, start: int = 0, length: int = 0) -> bytes:
        """Read a range; ``length`` 0 means to the end. Raises Missing, Unavailable."""

    def stream(self, key: str) -> Iterator[bytes]:
        """Read an object piece by piece. Raises Missing, Unavailable."""

    def delete(self, keys: list[str]) -> None:
        """Delete objects; keys that are not there do not matter."""

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix."""

    def sign_put(
        self, key: str, *, size: int, md5: str, until: datetime
    ) -> tuple[str, dict[str, str]]:
        """A signed PUT address for exactly this length and content, and the headers to send."""

    def sign_get(self, key: str, *, sha256: str, size: int, until: datetime) -> Download:
        """A signed GET address."""

    def ping(self) -> None:
        """Raises Unavailable unless the bucket answers."""


class S3Storage:
    """The port over any S3 server: the minio SDK for operations, botocore for signing."""

    def __init__(self, settings: AppSettings) -> None:
        self._bucket = settings.s3_bucket
        self._region = settings.s3_region
        self._public = settings.public_s3_endpoint.rstrip("/")
        access, secret = settings.s3_access_key, settings.s3_secret_key
        self._credentials = Credentials(access.get_secret_value(), secret.get_secret_value())
        endpoint = urlsplit(settings.s3_endpoint)
        self._minio = Minio(
            endpoint.netloc,
            access_key=access.get_secret_value(),
            secret_key=secret.get_secret_value(),
            secure=endpoint.scheme == "https",
            region=settings.s3_region,
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=3, read=60),
                retries=urllib3.Retry(total=2, backoff_factor=0.2),
                maxsize=32,
            ),
        )

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

    def put(self, key: str, stream: BinaryIO, size: int) -> None:
        """Write an object of exactly ``size`` bytes."""
        with _translated(key):
            self._minio.put_object(self._bucket, key, stream, size)

    def read(self, key: str, start: int = 0, length: int = 0) -> bytes:
        """Read a range; ``length`` 0 means to the end."""
        with _translated(key):
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

    def delete(self, keys: list[str]) -> None:
        """Delete objects; keys that are not there do not matter."""
        with _translated(", ".join(keys[:1])):
            doomed = [DeleteObject(key) for key in keys]
            for failure in self._minio.remove_objects(self._bucket, doomed):
                raise Unavailable(f"{failure.name} was not deleted: {failure.code}")

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix."""
        with _translated(prefix):
            for found in self._minio.list_objects(self._bucket, prefix=prefix, recursive=True):
                if found.object_name:
                    yield found.object_name

    def sign_put(
        self, key: str, *, size: int, md5: str, until: datetime
    ) -> tuple[str, dict[str, str]]:
        """A signed PUT address for exactly this length and content, and the headers to send."""
        headers = {
            "content-length": str(size),
            "content-md5": base64.b64encode(bytes.fromhex(md5)).decode(),
        }
        return self._sign("PUT", key, headers, until), headers

    def sign_get(self, key: str, *, sha256: str, size: int, until: datetime) -> Download:
        """A signed GET address."""
        return Download(
            url=self._sign("GET", key, {}, until), sha256=sha256, size=size, expires_at=until
        )

    def _sign(self, method: str, key: str, headers: dict[str, str], until: datetime) -> str:
        lifetime = max(1, int((until - datetime.now(until.tzinfo)) / timedelta(seconds=1)))
        url = f"{self._public}/{self._bucket}/{key}"
        request = AWSRequest(method=method, url=url, headers=headers)
        S3SigV4QueryAuth(self._credentials, "s3", self._region, expires=lifetime).add_auth(request)
        return str(request.url)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except S3Error as error:
        if error.code in {"NoSuchKey", "NoSuchBucket", "NotFound"}:
            raise Missing(f"object {key} is not in the store", code="object_missing") from error
        _unavailable(error)
    except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
        _unavailable(error)


def _unavailable(error: Exception) -> NoReturn:
    raise Unavailable(
        f"the object store does not answer ({type(error).__name__})", code="storage_unavailable"
    ) from error
