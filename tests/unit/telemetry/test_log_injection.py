"""What is logged may say anything, and remains one line that shows it all: no forged line, no hidden text, no key."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import unicodedata
from collections.abc import Callable
from io import StringIO
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.api.auth.authentication import Authenticator
from app.settings import hash_key
from app.settings.parsers import ApiKey
from app.telemetry import configure_logging, logger
from tests.support.logs import logging_put_back

Format = Literal["console", "json"]
FORMATS: tuple[Format, ...] = ("console", "json")
# Controls, format characters, line and paragraph separators, and halves of characters.
UNSEEN: tuple[Literal["Cc", "Cf", "Zl", "Zp", "Cs"], ...] = ("Cc", "Cf", "Zl", "Zp", "Cs")
FORGED = "x\n2026-01-01T00:00:00.000000Z [info     ] forged\r\x1b[2J\x9b31m\x85\u2028\u202e\u200b\ud800"
SECRET = "the-key-nobody-may-see"
texts = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(categories=UNSEEN), max_size=20),
    st.lists(st.sampled_from([FORGED, "a", " ", "=", '"', "'", "\\", "\t", "://u:", "@"]), max_size=6).map("".join),
)


def in_the_event(text: str) -> None:
    logger("part").info(f"said {text}")


def in_a_field(text: str) -> None:
    logger("part").warning("said", who=text, request_id=text)


def in_a_nested_field(text: str) -> None:
    logger("part").warning("said", many=[text, {text: text}], raw=text.encode(errors="surrogatepass"), pair=(text,))


def in_a_librarys_line(text: str) -> None:
    logging.getLogger("library").warning("said %s", text)


def in_a_librarys_fields(text: str) -> None:
    logging.getLogger("library").warning("said", extra={"who": text})


def in_an_exception(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        logger("part").exception("failed")


def in_a_chain_of_exceptions(text: str) -> None:
    try:
        try:
            raise OSError(text)
        except OSError as error:
            error.add_note(text)
            raise ExceptionGroup(text, [ValueError(text), error]) from error
    except ExceptionGroup:
        logging.getLogger("library").exception("failed")


PLACES: list[Callable[[str], None]] = [
    in_the_event,
    in_a_field,
    in_a_nested_field,
    in_a_librarys_line,
    in_a_librarys_fields,
    in_an_exception,
    in_a_chain_of_exceptions,
]


def written(log_format: Format, write: Callable[[], None]) -> str:
    stream = StringIO()
    with logging_put_back():
        configure_logging(log_format, "info", stream)
        write()
    return stream.getvalue()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@given(text=texts)
@example(text=FORGED)
def test_console_lines_cannot_be_forged(place: Callable[[str], None], text: str) -> None:
    shown = written("console", lambda: place(text))
    assert shown.endswith("\n")
    assert not [ascii(char) for char in shown if unicodedata.category(char) in UNSEEN and char not in "\n\t"]
    first, *more = shown[:-1].split("\n")
    assert re.match(r"\d{4}-\d\d-\d\dT", first)
    # A traceback has lines of its own, and none of them begins as a line of the log does.
    assert not more or "exception" in place.__name__
    assert not [line for line in more if re.match(r"\d{4}-", line)]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@given(text=texts)
@example(text=FORGED)
def test_json_log_is_one_line(place: Callable[[str], None], text: str) -> None:
    shown = written("json", lambda: place(text))
    assert shown.isascii()
    assert shown.count("\n") == 1
    line = json.loads(shown)
    assert {"timestamp", "level", "event"} <= line.keys()
    if place is in_a_field and "://" not in text:  # what looks like a password in a URL is hidden
        assert line["who"].encode("utf-16", "surrogatepass") == text.encode("utf-16", "surrogatepass")


class Failing(Authenticator):
    def find(self, key: str | None) -> None:
        held = {"x-api-key": key, "hashed": hash_key(key or "")}
        raise RuntimeError(f"{len(held)} headers cannot be read")


def _refused(key: str) -> None:
    try:
        Failing([ApiKey("ada", frozenset({"admin"}), hash_key(SECRET))]).require(key, "admin")
    except RuntimeError as error:
        raise ExceptionGroup("several", [error]) from error


def _logged_by_us(key: str) -> None:
    try:
        _refused(key)
    except ExceptionGroup as error:
        logger("api").error("unexpected_error", exc_info=error)


def _logged_by_a_library(key: str) -> None:
    try:
        _refused(key)
    except ExceptionGroup:
        logging.getLogger("library").exception("unexpected")


def _logged_by_the_event_loop(key: str) -> None:
    async def unawaited() -> None:
        async def fail(own_key: str) -> None:
            _refused(own_key)

        task = asyncio.get_running_loop().create_task(fail(key))
        await asyncio.wait({task})
        asyncio.get_running_loop().call_exception_handler(
            {"message": "never retrieved", "exception": task.exception(), "future": task}
        )

    asyncio.run(unawaited())


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize("log", [_logged_by_us, _logged_by_a_library, _logged_by_the_event_loop])
def test_key_is_not_in_a_traceback_when_it_was_in_scope(log_format: Format, log: Callable[[str], None]) -> None:
    shown = written(log_format, lambda: log(SECRET))
    assert "2 headers cannot be read" in shown
    assert "Traceback" in shown
    for secret in (SECRET, hash_key(SECRET).hex(), repr(hash_key(SECRET))[2:-1]):
        assert secret not in shown
