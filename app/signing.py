"""Signed addresses: SigV4 in the query, with headers and query parameters pinned.

Owns the credentials of signing. Must not talk to the store; the minio SDK cannot pin headers when
it signs an address, so botocore's signer does it.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from urllib.parse import urlencode

from botocore.auth import SIGV4_TIMESTAMP, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from app.settings import AppSettings

# At DEBUG botocore would log every signature with all that it signs: an address to be used.
logging.getLogger("botocore.auth").setLevel(logging.INFO)


class Signer:
    """Signs addresses of one bucket behind one endpoint."""

    def __init__(self, bucket_url: str, region: str, *, access_key: str, secret_key: str) -> None:
        self._bucket_url = bucket_url
        self._region = region
        self._credentials = Credentials(access_key, secret_key)

    @classmethod
    def of(cls, settings: AppSettings, endpoint: str) -> Self:
        """The signer of the configured bucket behind an endpoint."""
        return cls(
            f"{endpoint.rstrip('/')}/{settings.s3_bucket}",
            settings.s3_region,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
        )

    def sign(
        self,
        method: str,
        key: str,
        *,
        until: datetime,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        since: datetime | None = None,
    ) -> str:
        """An address that admits this method with exactly these headers and query parameters.

        It is valid from ``since`` (now) until ``until``, at least for a second.
        """
        start = since or datetime.now(UTC)
        lifetime = max(1, int((until - start) / timedelta(seconds=1)))
        url = f"{self._bucket_url}/{key}" + (f"?{urlencode(query)}" if query else "")
        request = AWSRequest(method=method, url=url, headers=dict(headers or {}))
        _QueryAuth(self._credentials, self._region, start, lifetime).add_auth(request)
        return str(request.url)


def pinned(size: int, md5: str) -> dict[str, str]:
    """The headers that bind an address to a body of this length and MD5 (in hex)."""
    return {
        "content-length": str(size),
        "content-md5": base64.b64encode(bytes.fromhex(md5)).decode(),
    }


class _QueryAuth(S3SigV4QueryAuth):  # type: ignore[misc]  # botocore ships no types
    """Botocore's signer with the time as an argument."""

    def __init__(
        self, credentials: Credentials, region: str, start: datetime, lifetime: int
    ) -> None:
        super().__init__(credentials, "s3", region, expires=lifetime)
        self._start = start

    def _modify_request_before_signing(self, request: Any) -> None:
        request.context["timestamp"] = self._start.astimezone(UTC).strftime(SIGV4_TIMESTAMP)
        super()._modify_request_before_signing(request)
