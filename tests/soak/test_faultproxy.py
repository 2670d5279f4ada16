"""Every fault does to a real HTTP exchange what its name says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from .faultproxy import HOST, Fault, FaultProxy, Kind, seeded

BODY = b"x" * 200_000


class Service(BaseHTTPRequestHandler):
    """Counts what arrives whole, and answers."""

    served: list[int]

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        data = self.rfile.read(size)
        if len(data) == size:
            self.served.append(size)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:  # a client that has gone is the point here
        pass


@pytest.fixture
def service() -> Iterator[tuple[int, list[int]]]:
    served: list[int] = []
    handler = type("Counting", (Service,), {"served": served})
    with Server((HOST, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port, served
        server.shutdown()
        thread.join()


def ask(port: int, fault: Fault) -> httpx.Response:
    with FaultProxy(port, lambda _: fault) as proxy, httpx.Client(timeout=0.5) as client:
        answer = client.post(f"http://{HOST}:{proxy.port}/", content=b"y" * 100_000)
    assert proxy.done == {fault.kind: 1}
    return answer


@pytest.mark.parametrize(
    "fault", [Fault(), Fault(Kind.LATENCY, seconds=0.01)], ids=lambda f: f.kind
)
def test_without_a_fatal_fault_everything_passes(service, fault):
    port, served = service
    assert ask(port, fault).content == BODY
    assert served == [100_000]


@pytest.mark.parametrize(
    ("fault", "error", "arrived"),
    [
        (Fault(Kind.RESET, after=50), httpx.TransportError, 0),
        (Fault(Kind.BLACK_HOLE), httpx.ReadTimeout, 0),
        (Fault(Kind.HALF_OPEN), httpx.ReadTimeout, 1),
        (Fault(Kind.CUT, after=5000), httpx.RemoteProtocolError, 1),
        (Fault(Kind.DROP_RESPONSE), httpx.NetworkError, 1),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_a_fatal_fault_is_felt_where_it_should_be(service, fault, error, arrived):
    port, served = service
    with pytest.raises(error):
        ask(port, fault)
    assert len(served) == arrived


def test_a_seeded_plan_is_repeatable_and_spoils_its_share():
    plan = [seeded(7, share=0.3)(number) for number in range(1000)]
    assert plan == [seeded(7, share=0.3)(number) for number in range(1000)]
    spoilt = [fault.kind for fault in plan if fault.kind is not Kind.NONE]
    assert 250 < len(spoilt) < 350
    assert set(spoilt) == set(Kind) - {Kind.NONE}
