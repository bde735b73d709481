"""An OpenTelemetry collector on loopback: it receives spans by OTLP over HTTP, from any process, and keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2


class CollectedSpan(NamedTuple):
    """A received span. `links` has the ids of the spans that it has links to. `text` is all of it, to be searched."""

    service: str
    name: str
    trace_id: str
    id: str
    parent: str
    links: list[str]
    attributes: dict[str, str | int]
    failed: bool
    text: str


class Collector:
    def __init__(self) -> None:
        self.spans: list[CollectedSpan] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the name that `http.server` calls
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                collector.spans += _decoded(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass  # requests are not printed

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def named(self, name: str) -> list[CollectedSpan]:
        return [span for span in self.spans if span.name == name]

    def path(self, span: CollectedSpan) -> list[str]:
        """The names of a span and of those that it is inside, from the outermost on."""
        above = [each for each in self.spans if each.id == span.parent]
        return [*(self.path(above[0]) if above else []), span.name]


@contextmanager
def running_collector() -> Iterator[Collector]:
    collector = Collector()
    thread = Thread(target=collector.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield collector
    finally:
        collector.server.shutdown()
        thread.join()
        collector.server.server_close()


def _decoded(body: bytes) -> Iterator[CollectedSpan]:
    for group in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = next(item.value.string_value for item in group.resource.attributes if item.key == "service.name")
        for scope in group.scope_spans:
            for span in scope.spans:
                yield CollectedSpan(
                    service=service,
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    links=[link.span_id.hex() for link in span.links],
                    attributes={item.key: item.value.string_value or item.value.int_value for item in span.attributes},
                    failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
                    text=str(span),
                )
