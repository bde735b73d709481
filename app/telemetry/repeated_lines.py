"""Log lines that callers and failures can cause without limit must not fill a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from app.telemetry.structlog_without_rich import structlog

MOST_LINES, SPAN_S = 20, 10.0
# What a caller, an author's SQL or a server that is away can cause any number of times.
REPEATED = frozenset(
    {
        "request",
        "sign_in_refused",
        "computation_failed",
        "invalidation_owed",
        "job_retried",
        "left_to_the_sweep",
        "not_answering",
        "publish_failed",
        "run_put_off",
        "unavailable",
        "unknown_decision",
    }
)
# Each takes few values, so that there are few kinds.
_KIND = ("event", "route", "status", "feature", "job", "what", "name")


@dataclass(slots=True)
class _Span:
    begun: float
    lines: int = 0


class RepeatedLines:
    """A processor of structlog: lets `MOST_LINES` of a kind through within `SPAN_S`.

    The first line of the kind after that says in `left_out` how many were not written.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._spans: dict[tuple[object, ...], _Span] = {}

    def __call__(
        self, _: structlog.typing.WrappedLogger, level: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        """The line, or raises `DropEvent`."""
        if level == "debug" or event["event"] not in REPEATED:
            return event
        kind, now = tuple(event.get(name) for name in _KIND), self._monotonic()
        span = self._spans.get(kind)
        if span is None or now - span.begun >= SPAN_S:
            if span is not None and span.lines > MOST_LINES:
                event["left_out"] = span.lines - MOST_LINES
            span = self._spans[kind] = _Span(now)
        span.lines += 1
        if span.lines > MOST_LINES:
            raise structlog.DropEvent
        return event
