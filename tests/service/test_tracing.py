"""Traces, sent to a receiver of OTLP: of a request, its transactions, its job, the store."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import tracing
from app.jobs import CAUSE
from fedselect.errors import FedSelectError

from .factories import contribute, make_clients, make_model, make_run

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Receiver(BaseHTTPRequestHandler):
    """Takes what an OTLP collector takes."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        found = ExportTraceServiceRequest.FromString(body)
        for resource in found.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def spans(monkeypatch) -> Iterator[list]:
    """What was sent, once :func:`tracing.close` has been called."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.spans = []
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(tracing.ENDPOINT, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tracing.configure("test")
    try:
        yield server.spans
    finally:
        tracing.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_one_trace_leads_from_the_request_through_the_job_to_the_store(
    project, core, spans, monkeypatch
):
    from workers import celery_app  # reads the settings, which the fixtures set

    rings = []
    monkeypatch.setattr(
        core.bell._celery,
        "send_task",
        lambda name, args, headers, **_: rings.append((args, headers)),
    )
    model = make_model(project)
    make_run(project, model)
    client = make_clients(project, 1)[0]
    contribute(client, model)
    (job,), headers = rings[-1]
    task = type("Task", (), {"request": type("Request", (), {"headers": headers})})
    assert set(headers[CAUSE]) >= {"traceparent", "request", "client", "project"}
    monkeypatch.setattr(celery_app, "_core", lambda: core)
    celery_app.run_job.run.__func__(task, job)
    tracing.close()
    (work,) = [s for s in spans if s.name == "job verify" and _says(s, "fedselect.job", job)]
    family = [s for s in spans if s.trace_id == work.trace_id]
    names = {s.name for s in family}
    assert "POST /v1/uploads/{upload_id}/complete" in names
    assert {"job verify", "storage stream", "transaction verify.accept"} <= names
    ids = {s.span_id: s for s in family}
    (root,) = [s for s in family if s.parent_span_id not in ids]
    assert root.name == "POST /v1/uploads/{upload_id}/complete"
    assert _says(work, "fedselect.outcome", "done")
    assert client.key not in str(spans)


def test_a_caller_s_trace_goes_on(api, spans):
    parent = f"00-{TRACE}-b7ad6b7169203331-01"
    api.get("/health/live", headers={"traceparent": parent})
    api.get("/health/live", headers={"traceparent": "nonsense"})
    tracing.close()
    first, second = [s for s in spans if s.name == "GET /health/live"]
    assert first.trace_id.hex() == TRACE
    assert second.trace_id.hex() != TRACE


def test_an_error_is_named_and_not_quoted(spans):
    with pytest.raises(FedSelectError), tracing.span("it"):
        raise FedSelectError("a secret")
    tracing.close()
    (found,) = spans
    assert _says(found, "error.type", "FedSelectError")
    assert "a secret" not in str(found)


def test_without_the_setting_nothing_is_traced(monkeypatch):
    monkeypatch.delenv(tracing.ENDPOINT, raising=False)
    tracing.configure("test")
    with tracing.span("it", parent={}) as span:
        span.say(run=1)
        span.http("GET", "/", 500)
        assert tracing.carried() == {}
    tracing.past("it", seconds=1)


def _says(span, name, value):
    return any(a.key == name and a.value.string_value == str(value) for a in span.attributes)
