"""How metrics get out: Prometheus's text format, and a port that answers with it.

Owns serving alone; which metrics there are is ``app.metrics``. Must not import the rest of the
service: the supervisor of the workers serves what its children count and outlives what is broken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where processes count together; the library reads it
log = logging.getLogger(__name__)


def render(registry: CollectorRegistry) -> bytes:
    """All metrics of a registry as text."""
    return generate_latest(registry)


def of_processes(folder: str) -> CollectorRegistry:
    """What all processes have counted that write to this folder, dead ones included."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    return registry


@contextmanager
def served(address: str, port: int | None, registry: CollectorRegistry) -> Iterator[None]:
    """Answer at this port, if there is one, with all metrics, to whoever can reach it.

    A port that is taken is logged and nothing else: metrics are no reason not to work.
    """
    try:
        running = None if port is None else start_http_server(port, address, registry)
    except OSError as error:
        log.warning("no metrics at %s:%s: %s", address, port, error.strerror)
        running = None
    if running is None:
        yield
        return
    server, thread = running
    log.info("metrics at %s:%d", address, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
