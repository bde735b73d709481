"""Structured logging with structlog.

`configure_logging` sends every line of the process to standard error. The code passes no key and no header to the log;
if a secret reaches a line by mistake, `_censor` hides it. Control characters in values are escaped, so that a value
cannot forge a log line. Lines that a caller could repeat without limit are written only a few times in ten seconds.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Literal, TextIO, cast

import msgspec

from app.errors import StoreFull

# structlog imports rich, if present, to format tracebacks. The logs have plain tracebacks, and importing rich took a
# tenth of a process's start. So no other module imports structlog, and only the command line imports rich.
_rich = sys.modules.get("rich")
sys.modules["rich"] = cast(ModuleType, None)  # makes `import rich` fail
try:
    import structlog as structlog  # noqa: PLC0414, TID251
finally:
    del sys.modules["rich"]
    if _rich is not None:
        sys.modules["rich"] = _rich

REQUEST_ID = "request_id"
Event = structlog.typing.EventDict
# The position in a trace (https://www.w3.org/TR/trace-context/): that of the request or job that runs, if
# `app.telemetry.tracing` is on.
TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)
SENSITIVE_FIELDS = {"api_key", "x-api-key", "authorization", "password", "cache_url", "queue_url", "model_key"}
_PASSWORD_IN_URL = re.compile(r"(\w+://[^\s:/@]*:)[^\s/]+@")
MOST_LINES, SPAN_S = 20, 10.0
# Events that a caller, a feature's SQL or an unreachable server can cause without limit.
REPEATED = {
    "request",
    "request_shed",
    "sign_in_refused",
    "computation_failed",
    "invalidation_owed",
    "job_retried",
    "left_to_the_sweep",
    "not_answering",
    "publish_failed",
    "run_put_off",
    "served_unproven",
    "unavailable",
    "unknown_decision",
}
# The fields that make up a kind of line. Each has few values, so there are few kinds.
_KIND = ("event", "route", "status", "feature", "job", "what", "name")


class RepeatedLines(msgspec.Struct, eq=False):
    """A structlog processor that passes `MOST_LINES` lines of one kind (with equal `_KIND` fields) in `SPAN_S` seconds
    and drops the others. The first line of the kind in the next span has the number of dropped lines in `left_out`."""

    monotonic: Callable[[], float] = time.monotonic
    _spans: dict[tuple[object, ...], tuple[float, int]] = {}  # by kind, the begin and the number of lines

    def __call__(self, _: structlog.typing.WrappedLogger, level: str, event: Event) -> Event:
        if level == "debug" or event["event"] not in REPEATED:
            return event
        kind, now = tuple(event.get(name) for name in _KIND), self.monotonic()
        begun, lines = self._spans.get(kind, (now, 0))
        if now - begun >= SPAN_S:
            if lines > MOST_LINES:
                event["left_out"] = lines - MOST_LINES
            begun, lines = now, 0
        self._spans[kind] = begun, lines + 1
        if lines >= MOST_LINES:
            raise structlog.DropEvent
        return event


def _censor(_: Any, __: str, event: Event) -> Event:
    for name, value in event.items():
        if name.lower() in SENSITIVE_FIELDS:
            event[name] = "[hidden]"
        elif isinstance(value, str) and "://" in value:
            event[name] = _PASSWORD_IN_URL.sub(r"\1[hidden]@", value)
    return event


def _printable(_: Any, __: str, event: Event) -> Event:
    """Escape control and invisible characters, so that a value cannot forge lines or move the cursor."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            lines = value.split("\n") if name == "exception" else [value]
            event[name] = "\n    ".join("".join(map(_shown, line)) for line in lines)
    return event


def _with_trace_id(_: Any, __: str, event: Event) -> Event:
    if (traceparent := TRACEPARENT.get()) is not None:
        event["trace_id"] = traceparent.split("-")[1]
    return event


def _shown(character: str) -> str:
    plain = character.isprintable() or character == "\t"
    return character if plain else character.encode("unicode_escape").decode()


_CONTEXT: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    _with_trace_id,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def _lines(*, colors: bool) -> list[structlog.typing.Processor]:
    # Other tracebacks print local variables, which may be keys.
    plain = structlog.dev.plain_traceback
    return [_printable, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]


# The format until `configure_logging` is called.
structlog.configure(
    processors=[*_CONTEXT, structlog.processors.format_exc_info, _censor, *_lines(colors=False)],
    logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
)


def configure_logging(log_format: Literal["console", "json"], level: str, stream: TextIO | None = None) -> None:
    """Send every log line of the process, including those of libraries, through structlog to `stream` or stderr."""
    on_screen = sys.stderr is not None and sys.stderr.isatty()
    rendering = [structlog.processors.JSONRenderer()] if log_format == "json" else _lines(colors=on_screen)
    structlog.configure(
        processors=[RepeatedLines(), *_CONTEXT, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_CONTEXT, structlog.stdlib.ExtraAdder()],
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
    # arq logs every job, aiosqlite every statement, httpx every request.
    for name in ("arq", "aiosqlite", "asyncio", "alembic", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # It warns at each attempt to reach a collector that is away, and then reports the error.
    logging.getLogger("opentelemetry").setLevel(max(logging.ERROR, root.level))


def warn(log: structlog.typing.FilteringBoundLogger, error: Exception) -> Callable[..., Any]:
    """Return `log.warning`, or `log.debug` for `StoreFull`, because `app.stores` itself logs a full disk, once."""
    return log.debug if isinstance(error, StoreFull) else log.warning


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    # Lazy, so that a logger created at import follows a later `configure_logging`.
    lazy: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name)
    return lazy
