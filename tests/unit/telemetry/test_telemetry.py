"""Metrics and log lines, by themselves."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from typing import Literal

import pytest
from prometheus_client import generate_latest

from app.errors import StoreFull, StoreUnavailable
from app.telemetry import Metrics, configure_logging, logger, warn
from app.telemetry.logs import MOST_LINES, SPAN_S, RepeatedLines, structlog
from tests.support.clock import FakeClock
from tests.support.logs import logging_put_back

Format = Literal["console", "json"]
FORMATS: tuple[Format, ...] = ("console", "json")


@pytest.fixture
def written() -> Iterator[StringIO]:
    """What is logged after `configure_logging(…, written)`; whatever that changes is put back."""
    with logging_put_back():
        yield StringIO()


@pytest.mark.parametrize("log_format", FORMATS)
def test_line_has_time_level_component_and_fields(written: StringIO, log_format: Format) -> None:
    configure_logging(log_format, "info", written)
    logger("part").info("it_happened", number=7)
    line = written.getvalue()
    for expected in ("it_happened", "part", "info", "7"):
        assert expected in line
    assert line.count("\n") == 1
    if log_format == "json":
        assert json.loads(line).keys() == {"timestamp", "level", "component", "event", "number"}


@pytest.mark.parametrize("log_format", FORMATS)
def test_line_of_a_library_looks_like_ours(written: StringIO, log_format: Format) -> None:
    configure_logging(log_format, "info", written)
    logging.getLogger("some.library").warning("it said %s", "this")
    line = written.getvalue()
    assert "it said this" in line
    assert "warning" in line
    if log_format == "json":
        assert json.loads(line)["event"] == "it said this"


def test_line_is_left_out_when_it_is_below_the_level(written: StringIO) -> None:
    configure_logging("json", "warning", written)
    logger("part").info("not_this")
    logging.getLogger("some.library").info("nor this")
    logging.getLogger("arq").warning("but this")
    assert [json.loads(line)["event"] for line in written.getvalue().splitlines()] == ["but this"]


def test_library_noise_is_left_out(written: StringIO) -> None:
    configure_logging("json", "debug", written)
    logging.getLogger("arq.worker").info("a job")
    logging.getLogger("aiosqlite").debug("a statement")
    logging.getLogger("httpx").info("HTTP Request: POST https://models.example")
    logging.getLogger("httpcore.http11").debug("send_request_headers.started")
    logger("part").debug("this")
    assert [json.loads(line)["event"] for line in written.getvalue().splitlines()] == ["this"]


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize("field", ["api_key", "password", "X-API-Key", "authorization", "cache_url", "model_key"])
def test_sensitive_field_is_hidden(written: StringIO, log_format: Format, field: str) -> None:
    configure_logging(log_format, "info", written)
    logger("part").info("asked", **{field: "top-secret"})
    assert "top-secret" not in written.getvalue()
    assert "[hidden]" in written.getvalue()


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize(
    "url", ["redis://:top-secret@host:6379/0", "rediss://user:top-secret@host", "redis://user:top-secret@more@host"]
)
def test_password_in_a_url_is_hidden_wherever_it_stands(written: StringIO, log_format: Format, url: str) -> None:
    configure_logging(log_format, "info", written)
    logger("part").warning(f"cannot reach {url}", error=f"connecting to {url} failed")
    try:
        raise OSError(f"connecting to {url} failed")
    except OSError as error:
        logger("part").error("failed", exc_info=error)
    text = written.getvalue()
    assert "host" in text
    assert "OSError" in text
    for secret in ("top-secret", "more@"):
        assert secret not in text


@pytest.mark.parametrize("log_format", FORMATS)
def test_log_line_cannot_be_forged(written: StringIO, log_format: Format) -> None:
    configure_logging(log_format, "info", written)
    evil = "a\n2026-01-01T00:00:00Z [info     ] forged\r\x1b[2J\x85\u2028\u202e"
    logger("part").info("asked", who=evil, many=[evil])
    logging.getLogger("some.library").info("it said %s", evil)
    lines = written.getvalue().split("\n")
    assert len(lines) == 3
    assert not any(character in line for line in lines for character in "\r\x1b\x85\u2028\u202e")


@pytest.mark.parametrize("log_format", FORMATS)
def test_traceback_shows_no_local_variables(written: StringIO, log_format: Format) -> None:
    configure_logging(log_format, "info", written)
    headers = {"x-api-key": "top-secret"}
    try:
        raise RuntimeError(f"{len(headers)} went wrong")
    except RuntimeError as error:
        logger("part").error("failed", exc_info=error)
    text = written.getvalue()
    assert "Traceback (most recent call last)" in text
    assert "RuntimeError: 1 went wrong" in text
    assert "top-secret" not in text


def test_traceback_shows_no_variables_without_configuration() -> None:
    program = """
import structlog, app.telemetry
key = "top" + "-" + "secret"
try:
    raise RuntimeError(f"{len(key)} went wrong")
except RuntimeError as error:
    structlog.get_logger().error("failed", exc_info=error)
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "RuntimeError: 10 went wrong" in shown.stderr + shown.stdout
    assert "top-secret" not in shown.stderr + shown.stdout


@pytest.mark.parametrize("log_format", FORMATS)
def test_nothing_fails_when_there_is_no_standard_error(log_format: Format) -> None:
    program = f"""
from app.telemetry import configure_logging, logger
configure_logging("{log_format}", "info")
logger("part").info("nobody reads this")
print("done")
"""
    closed = ["/bin/sh", "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, program]
    shown = subprocess.run(closed, stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (shown.returncode, shown.stdout) == (0, "done\n")


def test_processes_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.cache_hits.inc()
    assert b"profiles_cache_hits_total 1.0" in generate_latest(one.collectors)
    assert b"profiles_cache_hits_total 0.0" in generate_latest(other.collectors)


def test_metrics_are_named_with_base_units_and_explained() -> None:
    for family in Metrics().collectors.collect():
        assert family.name.startswith(("profiles_", "process_"))
        assert not family.name.endswith(("_ms", "_millis", "_kb", "_mb", "_minutes"))
        assert family.documentation.endswith(".")
        if family.type == "histogram" and family.name != "profiles_commit_events":
            assert family.name.endswith("_seconds")


def test_repeated_disk_full_errors_are_logged_quietly(written: StringIO) -> None:
    with logging_put_back():
        configure_logging("json", "info", written)
        log = logger("part")
        for error in (StoreFull("no room"), StoreUnavailable("locked")):
            warn(log, error)("tried_in_vain", error=str(error))
    assert [json.loads(line)["error"] for line in written.getvalue().splitlines()] == ["locked"]


def seen(lines: RepeatedLines, event: str, level: str = "info", **fields: object) -> int | None:
    """How many lines the line says were left out; None if it is left out itself."""
    try:
        line = lines(None, level, {"event": event, **fields})
    except structlog.DropEvent:
        return None
    return int(line.get("left_out", 0))


def test_repeated_line_is_logged_then_counted() -> None:
    clock = FakeClock()
    lines = RepeatedLines(clock.monotonic)
    shown = [seen(lines, "request", status=404, route="unmatched", request_id=str(number)) for number in range(1_000)]
    assert shown == [0] * MOST_LINES + [None] * (1_000 - MOST_LINES)
    assert seen(lines, "request", status=401, route="unmatched") == 0, "another kind of line was left out"
    assert seen(lines, "request", level="debug", status=404, route="unmatched") == 0
    assert [seen(lines, "consistency_violation", feature="f") for _ in range(100)] == [0] * 100
    clock.advance(int(SPAN_S * 1_000))
    assert [seen(lines, "request", status=404, route="unmatched") for _ in range(2)] == [1_000 - MOST_LINES, 0]
    clock.advance(int(SPAN_S * 1_000))
    assert seen(lines, "request", status=404, route="unmatched") == 0


@pytest.mark.parametrize("event", ["request", "request_shed"])
def test_process_log_leaves_repeated_lines_out(written: StringIO, event: str) -> None:
    configure_logging("json", "info", written)
    for _ in range(100):
        logger("part").warning(event, status=404, route="unmatched")
    assert len(written.getvalue().splitlines()) == MOST_LINES
