"""Calls to addresses that a customer has given: never into the operator's own network.

Owns the check of every address that a name stands for, and connects to the very one that was
checked (a name that changes its mind in between is a known attack, DNS rebinding). No proxies, no
redirects; of the answer nothing but the status is read. Must not know what is sent.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import httpx

from app.errors import Invalid, Unavailable

TIMEOUT = 10.0  # seconds for each step of a call


def post(url: str, body: bytes, headers: dict[str, str], *, private: bool) -> int:
    """POST to an address; returns the status.

    Raises:
        Invalid: the name stands for an address that is not public (webhook_address).
        Unavailable: it does not answer.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    address = _resolve(host, port, private=private)
    place = f"[{address}]" if ":" in address else address
    target = parts._replace(netloc=f"{place}:{port}", fragment="").geturl()
    shown = parts.netloc.rpartition("@")[2]
    try:
        with (
            httpx.Client(trust_env=False, follow_redirects=False, timeout=TIMEOUT) as client,
            client.stream(
                "POST",
                target,
                content=body,
                headers={**headers, "Host": shown},
                extensions={"sni_hostname": host},
            ) as answer,
        ):
            return answer.status_code
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unavailable(f"{type(error).__name__}", code="webhook_unreachable") from error


def _resolve(host: str, port: int, *, private: bool) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"no address for {host!r}", code="webhook_unreachable") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not private and not _public(address):
            raise Invalid(f"{host!r} is not a public address", code="webhook_address")
    return addresses[0]


def _public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    inner = mapped or found
    return inner.is_global and not inner.is_multicast and not inner.is_reserved
