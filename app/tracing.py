"""Traces, on when ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set: request, job, transaction, store.

Owns OpenTelemetry: whoever traces asks for a span here and gets one that does nothing unless traces
are on (`pip install 'fedselect[otel]'`). A job's trace goes on from the request that caused it,
which the doorbell's message tells; one that the sweeper rings for begins a trace of its own, so no
row knows of traces. Must not import the rest of the service.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedselect import __version__
from fedselect.errors import FedSelectError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_tracer: Any = None
_provider: Any = None


class Span:
    """What there is to say of a span; nothing comes of it while traces are off."""

    def __init__(self, real: Any = None) -> None:
        self._real = real

    def say(self, **attributes: object) -> None:
        """Add attributes, under ``fedselect.`` unless they have a dot; never a secret."""
        if self._real is None:
            return
        for name, value in attributes.items():
            known = value if isinstance(value, bool | int | float) else str(value)
            self._real.set_attribute(f"fedselect.{name}", known)

    def http(self, method: str, route: str, status: int) -> None:
        """What OpenTelemetry wants to know of a request; an answer in the 500s is an error."""
        if self._real is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._real.update_name(f"{method} {route}")
        self._real.set_attribute("http.request.method", method)
        self._real.set_attribute("http.route", route)
        self._real.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._real.set_status(Status(StatusCode.ERROR))


def configure(service: str) -> None:
    """Begin to send spans if the environment says where to; once in a process.

    OpenTelemetry reads its other variables itself (``OTEL_TRACES_SAMPLER``, headers, timeouts …).

    Raises:
        FedSelectError: extra_missing: traces are asked for and the libraries are not there.
    """
    global _tracer, _provider
    if not os.environ.get(ENDPOINT) or _tracer is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise FedSelectError(
            f"{ENDPOINT} is set, but {error.name} is missing: pip install 'fedselect[otel]'",
            code="extra_missing",
        ) from error
    about = {"service.name": f"fedselect-{service}", "service.version": __version__}
    _provider = TracerProvider(resource=Resource.create(about))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("fedselect", __version__)


def close() -> None:
    """Send what is waiting and end; for the end of a process."""
    global _tracer, _provider
    if _provider is not None:
        _provider.shutdown()
    _tracer = _provider = None


@contextmanager
def span(
    name: str, *, kind: str = "internal", parent: Mapping[str, str] | None = None, **facts: object
) -> Iterator[Span]:
    """Trace the block; an exception marks the span and goes on.

    ``kind`` is server, client, producer, consumer or internal. ``parent``: headers with a
    ``traceparent`` (W3C Trace Context), if it comes from another process.
    """
    if _tracer is None:
        yield Span()
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    context = extract(dict(parent)) if parent is not None else None
    # An exception's text may quote what was sent: its class is all that a trace may hold.
    with _tracer.start_as_current_span(
        name,
        context=context,
        kind=SpanKind[kind.upper()],
        record_exception=False,
        set_status_on_exception=False,
    ) as real:
        found = Span(real)
        found.say(**facts)
        try:
            yield found
        except Exception as error:
            _failed(real, error)
            raise


def past(name: str, *, seconds: float, kind: str = "internal") -> None:
    """A span that ends now and took so long: for work done in pieces, between those of others."""
    if _tracer is None:
        return
    from opentelemetry.trace import SpanKind

    end = time.time_ns()
    begun = end - int(seconds * 1e9)
    _tracer.start_span(name, kind=SpanKind[kind.upper()], start_time=begun).end(end)


def _failed(real: Any, error: Exception) -> None:
    from opentelemetry.trace import Status, StatusCode

    real.set_attribute("error.type", type(error).__name__)
    real.set_status(Status(StatusCode.ERROR))


def carried() -> dict[str, str]:
    """The headers that let another process go on with the present trace; empty without one."""
    if _tracer is None:
        return {}
    from opentelemetry.propagate import inject

    headers: dict[str, str] = {}
    inject(headers)
    return {name: value for name, value in headers.items() if name == "traceparent"}
