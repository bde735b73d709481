"""Traces with OpenTelemetry, if `PROFILES_TRACES_URL` is set. The standard `OTEL_…` variables configure the rest.

A process without traces does not import this module: bootstrap, `app.asgi` and `app.worker` wrap their parts only if
traces are on. Each request, job and consumption of events has a span. Each call of a wrapped port during such a span
has a child span. If requests share work, the work's span is a child of the request that began it.

Invariant: no span has an argument, a path, the text of an error or the id of a user.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import Thread
from typing import Any, TypeVar, cast

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, get_current_span, use_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.telemetry.logs import TRACEPARENT

CLOSE_S = 2.0
_HEADERS = frozenset({b"traceparent", b"tracestate"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_trace_context = TraceContextTextMapPropagator()
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]
Traceparents = Iterable[str | None]
SharedBy = Mapping[str, Callable[..., Traceparents]]
T = TypeVar("T")
_NONE: SharedBy = {}


class Tracing:
    """Makes the spans of a process and sends them in the background. `role` names the process, such as `api`."""

    def __init__(self, url: str, role: str) -> None:
        resource = Resource.create({SERVICE_NAME: f"profiles-{role}"}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces")))
        self._tracer = self._provider.get_tracer("profiles")

    async def close(self) -> None:
        """Send the remaining spans, for up to `CLOSE_S` seconds."""
        closing = Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_S)

    def middleware(self, inner: AsgiApp) -> AsgiApp:
        """Wrap an ASGI app: each request except probes has a span. It continues the trace of a `traceparent` header."""

        async def traced(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or scope["path"] in _PROBES:
                await inner(scope, receive, send)
                return
            headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _HEADERS}
            method = scope["method"] if scope["method"] in _METHODS else "HTTP"
            with self._span(method, SpanKind.SERVER, _trace_context.extract(headers)) as span:

                async def noting(message: Any) -> None:
                    if message["type"] == "http.response.start":
                        span.set_attribute("http.response.status_code", message["status"])
                        span.set_attribute("request_id", dict(message["headers"]).get(b"x-request-id", b"").decode())
                        if message["status"] >= 500:
                            span.set_status(StatusCode.ERROR)
                    await send(message)

                span.set_attribute("http.request.method", method)
                try:
                    await inner(scope, receive, noting)
                finally:
                    if (route := scope.get("path_template")) is not None:
                        span.update_name(f"{method} {route}")
                        span.set_attribute("http.route", route)

        return traced

    def job(self, name: str, work: Callable[..., Awaitable[None]]) -> Callable[..., Coroutine[Any, Any, None]]:
        """Wrap an arq job: each try has a span, which continues the trace of the keyword argument `traceparent`."""

        @wraps(work)
        async def traced(ctx: Any, *arguments: object, traceparent: object = None) -> None:
            with self._span(f"job {name}", SpanKind.CONSUMER, _context(traceparent)) as span:
                span.set_attribute("job.try", ctx.get("job_try") or 1)
                await work(ctx, *arguments)

        return traced

    @contextmanager
    def consuming(self, traceparents: Traceparents) -> Iterator[None]:
        """While events are consumed, open a span in the trace of each event, with a link to the current span."""
        links = _links(get_current_span())
        with ExitStack() as stack:
            # The first is entered last, so that the calls inside are its children.
            for traceparent in reversed(_distinct(traceparents)):
                stack.enter_context(self._span("consume events", SpanKind.CONSUMER, _context(traceparent), links))
            yield

    def port(self, name: str, port: T, shared_by: SharedBy = _NONE) -> T:
        """Wrap a port: each call of a coroutine method inside a span has a child span `name.method`. If several
        requests share a call of a method, `shared_by[method]` returns their traceparents, given the positional
        arguments of the call. The child span has links to these requests."""
        return cast(T, _Port(self._span, name, port, shared_by))

    @contextmanager
    def _span(self, name: str, kind: SpanKind, parent: Context | None, links: Sequence[Link] = ()) -> Iterator[Span]:
        """Run the block in a new span. Without a `parent`, the current span is its parent."""
        span = self._tracer.start_span(name, parent, kind, links=links)
        carrier: dict[str, str] = {}
        with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            _trace_context.inject(carrier)
            token = TRACEPARENT.set(carrier.get("traceparent"))
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error.__cause__ or error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                TRACEPARENT.reset(token)


class _Port:
    def __init__(self, span: Any, name: str, port: object, shared_by: SharedBy) -> None:
        self._span = span
        self._name = name
        self._port = port
        self._shared_by = shared_by

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._port, name)
        if not inspect.iscoroutinefunction(call):
            return call
        span_name, shared_by = f"{self._name}.{name}", self._shared_by.get(name)

        @wraps(call)
        async def traced(*arguments: Any, **options: Any) -> Any:
            # Periodic work has no span. Not `is_recording`: values are stored in the cache after the span has ended.
            if not get_current_span().get_span_context().trace_flags.sampled:
                return await call(*arguments, **options)
            sharing = _distinct(shared_by(*arguments)) if shared_by is not None else []
            others = [get_current_span(_context(each)) for each in sharing if each != TRACEPARENT.get()]
            links = [link for other in others for link in _links(other)]
            with self._span(span_name, SpanKind.INTERNAL, None, links):
                return await call(*arguments, **options)

        setattr(self, name, traced)
        return traced


def _context(traceparent: object) -> Context:
    """The context of a remote span; an empty one if `traceparent` is invalid or None."""
    return _trace_context.extract({"traceparent": traceparent} if isinstance(traceparent, str) else {})


def _links(span: Span) -> list[Link]:
    return [Link(context)] if (context := span.get_span_context()).is_valid else []


def _distinct(traceparents: Traceparents) -> list[str]:
    return list(dict.fromkeys(each for each in traceparents if each is not None))
