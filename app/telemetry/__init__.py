"""Every metric and every log-field name, in one place.

`Metrics` belongs to one process and is handed in; each of its attributes is one Prometheus metric. Labels are always
of a small closed set (feature, route, outcome), never a user. `configure_logging` sets structlog up once; keys and
headers are never logged, and `_censor` drops them if they are.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server

from app.errors import StoreFull
from app.telemetry.bandit_metrics import BanditMetrics
from app.telemetry.counters import FastCounter, HistogramCollector
from app.telemetry.repeated_lines import RepeatedLines
from app.telemetry.structlog_without_rich import structlog

REQUEST_ID = "request_id"
SENSITIVE_FIELDS = frozenset(
    {"api_key", "x-api-key", "authorization", "password", "cache_url", "queue_url", "model_key"}
)
_PASSWORD_IN_URL = re.compile(r"(\w+://[^\s:/@]*:)[^\s/]+@")

FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)


class Metrics:
    """The metrics of one process. Counters count since its start; times are in seconds."""

    def __init__(self) -> None:
        self.collectors = CollectorRegistry()
        self.request_seconds = self._spread(
            "http_request_duration_seconds", "Time to answer, by route and status.", FAST, "method", "route", "status"
        )
        self.shed = self._counter("requests_shed_total", "Requests sent away (503), by kind of load.", "kind")
        self.rate_limited = self._counter("rate_limited_total", "Requests refused (429), by the key's name.", "key")
        self.cache_hits = self._tally("cache_hits_total", "Feature values answered from the cache.")
        self.near_hits = self._tally("near_hits_total", "Of these, values from the process's own memory.")
        self.cache_misses = self._tally("cache_misses_total", "Feature values that the cache did not hold.")
        self.fills = self._counter(
            "cache_fills_total",
            "Fills by outcome: stored; refused (an invalidation or another fill came first); failed.",
            "outcome",
        )
        self.degraded_reads = self._counter(
            "degraded_reads_total", "Profiles computed because the cache was away or not trusted.", "reason"
        )
        self.cache_seconds = self._spread(
            "cache_round_trip_seconds", "Round trip to the cache, by command.", FAST, "command"
        )
        self.cache_errors = self._counter("cache_errors_total", "Cache commands that failed, by kind.", "kind")
        self.cache_available = self._gauge("cache_available", "1 while the circuit to the cache is closed.")
        self.computed_users = self._counter("computed_users_total", "Users whose features were computed.")
        self.computation_seconds = self._histogram(
            "computation_seconds", "Time of one computing statement, thread hop included.", FAST
        )
        self.computation_errors = self._counter(
            "computation_errors_total", "Values refused: wrong type, or an SQL error, by feature.", "feature"
        )
        self.events = self._counter("events_total", "Events by door and outcome.", "door", "outcome")
        self.commit_seconds = self._histogram("commit_seconds", "Time of one ingest transaction.", FAST)
        self.commit_events = self._histogram(
            "commit_events", "Events that shared one commit.", (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
        )
        self.invalidations = self._counter(
            "invalidations_total", "Users whose keys were dropped, or owed to later.", "outcome"
        )
        self.stale_dropped = self._counter(
            "stale_values_dropped_total", "Cached values older than an event, dropped when a worker took it up."
        )
        self.owed = self._gauge("owed_invalidations", "Invalidations owed to the cache at the last look.")
        self.queue_depth = self._gauge("queue_depth", "Jobs waiting in the queue; -1 while it cannot be reached.")
        self.oldest_unconsumed = self._gauge(
            "oldest_unconsumed_event_age_seconds", "Age of the oldest event no worker has consumed; 0 where none."
        )
        self.unconsumed = self._gauge("unconsumed_events", "Events that no worker has consumed yet (the outbox).")
        self.dead_letters = self._gauge("dead_letters", "Dead letters waiting for an admin.")
        self.events_ahead = self._gauge(
            "events_ahead", "Events said to have occurred more than five minutes from now, at most 10,000."
        )
        self.publish_failures = self._counter(
            "publish_failures_total", "Jobs the queue did not take; the sweep makes good for them."
        )
        self.invalidation_lag = self._histogram(
            "invalidation_lag_seconds", "From an event's arrival at its door to its keys dropped or owed.", FAST, "door"
        )
        self.queue_door_lag = self._histogram(
            "queue_door_lag_seconds", "From a job's enqueueing to its events' keys dropped or owed.", FAST
        )
        self.consumption_lag = self._histogram(
            "consumption_lag_seconds", "From an event's arrival to its consumption by a worker.", SLOW
        )
        self.consistency_checks = self._counter(
            "consistency_checks_total", "Users checked so long after an event, by outcome.", "after", "outcome"
        )
        self.consistency_violations = self._counter(
            "consistency_violations_total", "Cached values that the audit found untrue.", "feature", "fault"
        )
        self.consistency_repairs = self._counter(
            "consistency_repairs_total", "Cached values that the audit dropped since they were untrue."
        )
        self.bandit = BanditMetrics(self.collectors)
        self.jobs = self._counter("worker_jobs_total", "Jobs by name and outcome.", "job", "outcome")
        self.generations = self._counter("generations_total", "Tips worded: who did, or why no model.", "outcome")
        self.model_seconds = self._histogram("model_seconds", "Time of asking the model, tries included.", SLOW)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"profiles_{name}", text, labels, registry=self.collectors)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"profiles_{name}", text, registry=self.collectors)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"profiles_{name}", text, labels, buckets=buckets, registry=self.collectors)

    def _tally(self, name: str, text: str) -> FastCounter:
        return FastCounter(f"profiles_{name}", text, self.collectors)

    def _spread(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> HistogramCollector:
        return HistogramCollector(f"profiles_{name}", text, buckets, labels, self.collectors)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.collectors)


def serve_metrics(metrics: Metrics, host: str, port: int) -> Callable[[], None]:
    """Serve a worker's metrics, on a thread of their own; the function returned stops that. Port 0 serves none.

    A port that is taken, as by another worker of this machine, is logged: the worker is of use without it.
    """
    if port == 0:
        return lambda: None
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.collectors)
    except OSError as error:
        detail = "this worker serves no metrics; set PROFILES_WORKER_METRICS_PORT to a port of its own, or to 0"
        logger("telemetry").error("metrics_not_served", host=host, port=port, error=str(error), detail=detail)
        return lambda: None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _censor(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if name.lower() in SENSITIVE_FIELDS:
            event[name] = "[hidden]"
        elif isinstance(value, str) and "://" in value:
            event[name] = _PASSWORD_IN_URL.sub(r"\1[hidden]@", value)
    return event


def _printable(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape what would move the cursor, begin a line, turn the direction or hide: a line is what it looks like."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            lines = value.split("\n") if name == "exception" else [value]
            event[name] = "\n    ".join("".join(map(_shown, line)) for line in lines)
    return event


def _shown(character: str) -> str:
    plain = character.isprintable() or character == "\t"
    return character if plain else character.encode("unicode_escape").decode()


# Until `configure_logging` is called: what structlog does by itself prints local variables, keys among them.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _censor,
        _printable,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ],
    logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
)


def configure_logging(
    log_format: Literal["console", "json"], level: str, write: Callable[[str], object] | None = None
) -> None:
    """Send every log line of the process, the libraries' included, through structlog to standard error."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    on_screen = sys.stderr is not None and sys.stderr.isatty()
    plain = structlog.dev.plain_traceback  # the richer ones print local variables, and keys may be among them
    rendering: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [_printable, structlog.dev.ConsoleRenderer(colors=on_screen, exception_formatter=plain)]
    )
    structlog.configure(
        processors=[RepeatedLines(), *shared[:2], shared[3], structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_Stream(write) if write else sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                _censor,
                *rendering,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # Noise below warning: arq logs every job, aiosqlite every statement, httpx every request.
    for name in ("arq", "aiosqlite", "asyncio", "alembic", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class _Stream:
    """A text stream over a function, for tests and for `profiles up`."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write

    def flush(self) -> None:
        """Nothing is kept back."""


def warn(log: structlog.typing.FilteringBoundLogger, error: Exception) -> Callable[..., Any]:
    """Tells of what will be tried again; quietly where the disk is full, of which the database tells once."""
    return log.debug if isinstance(error, StoreFull) else log.warning


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger bound to the component `name`."""
    # Lazy, so that loggers made at import follow the configuration made later.
    lazy: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name)
    return lazy
