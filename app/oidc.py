"""People who sign in elsewhere: OpenID Connect tokens of one issuer.

Owns the check of a token and the issuer's keys, which are fetched when they are needed and kept.
What a person may do is their membership (``app.members``), never a claim. Must not know rows.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Any

import httpx
import jwt

from app.errors import Unauthorized, Unavailable

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]  # no shared secrets
FRESH = 3600.0  # seconds that the issuer's keys are kept
AGAIN = 30.0  # seconds before an unknown key makes us ask again: anybody can invent one
STALE = 86_400.0  # seconds that they are kept while the issuer is away
LEEWAY = 30  # seconds by which clocks may differ
LARGEST = 1024 * 1024  # bytes of an answer
LOOKS = re.compile(r"[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}\.[A-Za-z0-9_-]{2,}")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Person:
    """Who the issuer says is there."""

    issuer: str
    subject: str
    expires_at: datetime


class Issuer:
    """One OpenID provider; thread-safe."""

    def __init__(
        self, issuer: str, audience: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._issuer, self._audience, self._clock = issuer, audience, clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched: float | None = None
        self._failed: float | None = None
        self._lock = Lock()

    def person(self, authorization: str | None) -> Person | None:
        """Who a bearer token stands for; None if it is none of an issuer's.

        Raises:
            Unauthorized: it is forged, expired, of another issuer or for somebody else.
            Unavailable: the issuer's keys cannot be fetched.
        """
        scheme, _, text = (authorization or "").partition(" ")
        token = text.strip()
        if scheme.lower() != "bearer" or not LOOKS.fullmatch(token):
            return None
        try:
            found = jwt.decode(
                token,
                self._key(str(jwt.get_unverified_header(token).get("kid", ""))),
                algorithms=ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise Unauthorized("this token has expired; sign in again", code="token_expired") from (
                error
            )
        except jwt.PyJWTError as error:
            log.info("a token was refused: %s", type(error).__name__)
            raise Unauthorized("this token is not valid here", code="token_invalid") from error
        return Person(self._issuer, found["sub"], datetime.fromtimestamp(found["exp"], UTC))

    def _key(self, kid: str) -> jwt.PyJWK:
        with self._lock:
            age = self._since(self._fetched)
            if age > FRESH or (kid not in self._keys and age > AGAIN):
                self._renew(age)
            if kid not in self._keys:
                raise jwt.InvalidKeyError("no such key")
            return self._keys[kid]

    def _since(self, moment: float | None) -> float:
        return math.inf if moment is None else self._clock() - moment

    def _renew(self, age: float) -> None:
        """Fetch the keys. While the issuer is away those that we have go on for a day, and it is
        asked now and then: whoever sends an invented token would let everybody wait for it.
        """
        if self._since(self._failed) > AGAIN:
            try:
                self._keys = self._fetch()
            except Unavailable:
                self._failed = self._clock()
            else:
                self._fetched, self._failed = self._clock(), None
                return
        if age > STALE:
            raise Unavailable("the identity provider does not answer", code="issuer_unavailable")

    def _fetch(self) -> dict[str, jwt.PyJWK]:
        try:
            with httpx.Client(timeout=5, follow_redirects=False) as client:
                place = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
                document = _json(client, place)
                _check(document.get("issuer") == self._issuer, "another issuer answers there")
                found = _json(client, str(document["jwks_uri"]))
            return {
                str(each["kid"]): jwt.PyJWK(each)
                for each in found["keys"]
                if "kid" in each and each.get("kty") in {"RSA", "EC", "OKP"}
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError, jwt.PyJWTError) as error:
            log.warning("the issuer's keys cannot be fetched: %s", type(error).__name__)
            raise Unavailable("its keys cannot be fetched", code="issuer_unavailable") from error


def _json(client: httpx.Client, url: str) -> dict[str, Any]:
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        body = b""
        for chunk in answer.iter_bytes():
            body += chunk
            _check(len(body) <= LARGEST, "too large an answer")
    found = httpx.Response(200, content=body).json()
    _check(isinstance(found, dict), "no JSON object")
    return dict(found)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
