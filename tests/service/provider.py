"""An OpenID provider that really listens, for tests of people who sign in elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from .factories import Json

AUDIENCE = "fedselect"


@dataclass
class Provider:
    """An OpenID provider with one key, or several."""

    port: int = 0
    keys: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    said: str | None = None  # what it calls itself, if not by its address

    @property
    def issuer(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def documents(self) -> dict[str, Json]:
        def public(kid: str, key: Any) -> Json:
            kind = "RSA" if isinstance(key, rsa.RSAPrivateKey) else "EC"
            algorithm = jwt.algorithms.RSAAlgorithm if kind == "RSA" else jwt.algorithms.ECAlgorithm
            return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}

        return {
            "/.well-known/openid-configuration": {
                "issuer": self.said or self.issuer,
                "jwks_uri": f"{self.issuer}/keys",
            },
            "/keys": {"keys": [public(kid, key) for kid, key in self.keys.items()]},
        }

    def token(
        self, subject: str = "sato", *, kid: str = "one", key: Any = None, **claims: Any
    ) -> str:
        key = key or self.keys[kid]
        now = int(time.time())
        body = {"iss": self.issuer, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 300}
        algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        return jwt.encode({**body, **claims}, key, algorithm=algorithm, headers={"kid": kid})


class Quiet(BaseHTTPRequestHandler):
    """One that tells nobody who has called."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(handler: type[Quiet]) -> Iterator[int]:
    """Answer calls to a port of this machine, which it gives."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(10)


@contextmanager
def listening(found: Provider) -> Iterator[Provider]:
    """Serve the provider's documents on a port of this machine."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            document = found.documents().get(self.path)
            body = json.dumps(document).encode()
            self.send_response(200 if document else 404)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:  # a webhook's receiver that knows nothing of it
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(404)
            self.end_headers()

    with serving(Handler) as found.port:
        yield found
