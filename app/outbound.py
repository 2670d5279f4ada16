"""Calls to addresses that a customer has given: never into the operator's own network.

Owns the check of every address that a name stands for, and connects to the very one that was
checked (a name that changes its mind in between is a known attack, DNS rebinding). No proxies, no
redirects; of the answer nothing but the status is read. Must not know what is sent.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any
from urllib.parse import urlsplit

import httpx

from app.errors import Invalid, Unavailable

TIMEOUT = 10.0  # seconds for each step of a call
LONGEST = 20.0  # seconds for all of them: a byte now and then makes a step last for ever


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
            _ended_after(LONGEST) as traced,
            httpx.Client(trust_env=False, follow_redirects=False, timeout=TIMEOUT) as client,
            client.stream(
                "POST",
                target,
                content=body,
                headers={**headers, "Host": shown},
                extensions={"sni_hostname": host, "trace": traced},
            ) as answer,
        ):
            return answer.status_code
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise Unavailable(f"{type(error).__name__}", code="webhook_unreachable") from error


@contextmanager
def _ended_after(seconds: float) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Cut the connections of a call that takes so long; gives what httpx calls at each event."""
    held: list[socket.socket] = []

    def cut() -> None:
        for each in held:
            with suppress(OSError):  # it is over already
                each.shutdown(socket.SHUT_RDWR)

    def traced(event: str, told: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            # A second handle: TLS takes the first one away.
            held.append(told["return_value"].get_extra_info("socket").dup())

    timer = Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield traced
    finally:
        timer.cancel()
        for each in held:
            each.close()


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
    if isinstance(found, ipaddress.IPv6Address):
        if found.is_site_local or found.sixtofour is not None:  # another network's own addresses
            return False
        found = found.ipv4_mapped or found
    return found.is_global and not found.is_multicast and not found.is_reserved
