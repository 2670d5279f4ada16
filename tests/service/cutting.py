"""A link that is cut again and again: a TCP proxy that hangs up in the middle of a transfer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 64 * 1024


class CuttingProxy:
    """Forwards to ``target`` and cuts the connection after every ``every`` bytes towards it."""

    def __init__(self, target: tuple[str, int], *, every: int) -> None:
        self._target, self._every = target, every
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self.most = 10**9  # cuts
        self.sent = 0  # bytes taken from clients, of all connections
        self.cuts = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for pump in (self._up, self._down):
                    threading.Thread(target=pump, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(CHUNK):
                if self._uses_up(len(data)):
                    break
                server.sendall(data)
        _hang_up(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK):
                client.sendall(data)
        _hang_up(client, server)

    def _uses_up(self, count: int) -> bool:
        with self._lock:
            self.sent += count
            cut = min(self.sent // self._every, self.most) > self.cuts
            self.cuts += cut
            return cut


def _hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def cutting(target: tuple[str, int], *, every: int) -> Iterator[CuttingProxy]:
    """A proxy for the time of a test."""
    proxy = CuttingProxy(target, every=every)
    try:
        yield proxy
    finally:
        proxy.close()
