"""Opens connections to PostgreSQL that run the SQL of the repositories, and names its errors.

Every connection is in autocommit mode, with explicit transactions, and accepts parameters as SQLite does (`?` and
`:name`). Whole numbers are always sent as `bigint`, so that a statement has one plan whatever the values are. JSON is
text, as in SQLite: `json_each` has the elements of an array as its `value`, and `->>` takes text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import psycopg
from psycopg import errors
from psycopg.adapt import AdaptersMap, Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumperUnknown

from app.errors import StoreFull, StoreUnavailable
from app.stores.sql.database import Parameters

CONNECT_TIMEOUT_S = 3
LOCK_TIMEOUT_MS = 5_000
STATEMENT_TIMEOUT_MS = 30_000
# The planner would plan anew for each set of parameters, which takes longer than most statements, and compile some.
_SESSION = {
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "lock_timeout": LOCK_TIMEOUT_MS,
    "statement_timeout": STATEMENT_TIMEOUT_MS,
    "idle_in_transaction_session_timeout": STATEMENT_TIMEOUT_MS,
    "default_transaction_isolation": "read committed",
}
NO_ROOM = (errors.DiskFull, errors.OutOfMemory)
_TOKENS = re.compile(r"'(?:[^']|'')*'|--[^\n]*|::|:(\w+)|\?|%")
_JSON = (
    (re.compile(r"\bjson_each\(([^()]+)\)"), r"json_array_elements_text(CAST(\1 AS json))"),
    (re.compile(r"([\w.]+)(?= ->>? )"), r"CAST(\1 AS json)"),
)


class _NumericLoader(Loader):
    """A `numeric`, such as the sum of whole numbers, becomes an int or a float, as in SQLite."""

    def load(self, data: Any) -> int | float:
        text = bytes(data)
        return int(text) if text.lstrip(b"-").isdigit() else float(text)


class _TextDumper(StrDumperUnknown):
    """NUL, which PostgreSQL cannot store, becomes U+FFFD. It may be part of an error message, but of no id."""

    def dump(self, obj: str) -> bytes:
        return obj.replace("\0", "\ufffd").encode()


class _Context:
    connection = None
    adapters = AdaptersMap(psycopg.adapters)


_CONTEXT = _Context()
_CONTEXT.adapters.register_dumper(int, Int8Dumper)
_CONTEXT.adapters.register_dumper(str, _TextDumper)
_CONTEXT.adapters.register_loader("numeric", _NumericLoader)


@lru_cache(maxsize=1_024)
def translated(statement: str) -> bytes:
    """The statement as psycopg and PostgreSQL expect it."""

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return f"%({match[1]})s"
        return "%s" if match[0] == "?" else match[0].replace("%", "%%")

    for pattern, replacement in _JSON:
        statement = pattern.sub(replacement, statement)
    return _TOKENS.sub(replace, statement).encode()


class Connection:
    """A connection of psycopg as `app.stores.sql.database.Connection`."""

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw

    def execute(self, statement: str, parameters: Parameters = (), /) -> psycopg.Cursor[Any]:
        return self.raw.execute(translated(statement), parameters)

    def executemany(self, statement: str, rows: Iterable[Sequence[object] | Mapping[str, object]], /) -> Any:
        cursor = self.raw.cursor()
        cursor.executemany(translated(statement), rows)
        return cursor


def connect(url: str) -> Connection:
    """Connect to the server that accepts writes. Raises `StoreUnavailable` if none does."""
    options = " ".join(f"-c {name}={str(value).replace(' ', chr(92) + ' ')}" for name, value in _SESSION.items())
    defaults: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "target_session_attrs": "read-write",
        "options": options,
    }
    try:
        raw = psycopg.connect(
            make_conninfo(**{**defaults, "fallback_application_name": "profiles", **conninfo_to_dict(url)}),
            autocommit=True,
            prepare_threshold=2,
            context=_CONTEXT,
        )
    except psycopg.Error as error:
        raise unavailable(error) from error
    return Connection(raw)


def unavailable(error: psycopg.Error) -> StoreUnavailable:
    """The `StoreUnavailable` for an error of PostgreSQL: it cannot be reached, is full, locked or in recovery."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, NO_ROOM):
        return StoreFull(f"the database has no room to write: {text}")
    return StoreUnavailable(f"the database does not answer: {text}")
