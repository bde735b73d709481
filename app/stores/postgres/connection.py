"""Opens connections to PostgreSQL that run the SQL of the repositories, and turns psycopg errors into
`StoreUnavailable`. Every connection is in autocommit mode, with explicit transactions. Statements are written as for
SQLite and translated: parameters are `?` or `:name`, JSON is text, and `json_each` yields the elements of an array in
the column `value`. Whole numbers are always sent as `bigint`, so that each statement has one plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg
from psycopg import errors
from psycopg.adapt import AdaptersMap, Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumperUnknown

from app.errors import StoreFull, StoreUnavailable
from app.stores.sql.database import SELECT_REVISION, Parameters

CONNECT_TIMEOUT_S = 3
LOCK_TIMEOUT_MS = 5_000
STATEMENT_TIMEOUT_MS = 30_000
# By default, many statements are planned at each call, which takes longer than they run, and some are compiled.
_SESSION = {
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "lock_timeout": LOCK_TIMEOUT_MS,
    "statement_timeout": STATEMENT_TIMEOUT_MS,
    "idle_in_transaction_session_timeout": STATEMENT_TIMEOUT_MS,
    "default_transaction_isolation": "read committed",
}
# A promoted standby has a new timeline, data of another cluster a new system identifier, a restored dump new oids.
DATABASE_ID = """(SELECT value FROM service WHERE name = 'database_id')
    || ':' || (SELECT system_identifier FROM pg_control_system())
    || ':' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
    || ':' || CAST(CAST('service' AS regclass) AS oid)"""
SET_SESSION = (
    "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _SESSION.items())
).encode()
_DEFAULTS: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "target_session_attrs": "read-write",
    "fallback_application_name": "profiles",
    # A host that is silently gone is noticed within a few seconds.
    "tcp_user_timeout": CONNECT_TIMEOUT_S * 1000,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
}
# The first alternatives are literals, quoted names and comments, which are not translated.
_TOKENS = re.compile(
    r"""
    \b[eE]'(?:[^'\\]|\\.|'')*' | '[^']*' | "[^"]*" | \$(\w*)\$.*?\$\1\$ | --[^\n]* | /\*.*?\*/
    | \bjson_each\((?P<list>[^()]+)\)
    | (?P<json>[\w.]+)(?=\ ->>?\ )
    | (?<![\w:]):(?P<name>\w+)
    | (?P<place>\?)
    """,
    re.VERBOSE | re.DOTALL,
)


class _NumericLoader(Loader):
    """Converts a `numeric`, such as the sum of whole numbers, to an int or a float, as in SQLite."""

    def load(self, data: Any) -> int | float:
        text = bytes(data)
        return int(text) if text.lstrip(b"-").isdigit() else float(text)


class _TextDumper(StrDumperUnknown):
    """Sends each NUL in a text as U+FFFD: PostgreSQL cannot store NUL. Error messages may contain it; ids never do."""

    def dump(self, obj: str) -> bytes:
        return obj.replace("\0", "\ufffd").encode()


_CONTEXT = SimpleNamespace(connection=None, adapters=AdaptersMap(psycopg.adapters))
_CONTEXT.adapters.register_dumper(int, Int8Dumper)
_CONTEXT.adapters.register_dumper(str, _TextDumper)
_CONTEXT.adapters.register_loader("numeric", _NumericLoader)


class Translated(NamedTuple):
    """A statement in PostgreSQL's syntax. `names`: the names of its parameters `$1`, `$2`, …; empty without names."""

    text: bytes
    names: tuple[str, ...]

    def arguments(self, parameters: Parameters) -> Sequence[object]:
        if isinstance(parameters, Mapping):
            return [parameters[name] for name in self.names]
        return parameters


# psycopg would parse each long statement again, which takes as long as running it.
@lru_cache(maxsize=1_024)
def translated(statement: str) -> Translated:
    names: dict[str, int] = {}
    places = count(1)

    def replace(match: re.Match[str]) -> str:
        if match["list"]:
            return f"json_array_elements_text(CAST({_TOKENS.sub(replace, match['list'])} AS json))"
        if match["json"]:
            return f"CAST({match['json']} AS json)"
        if match["name"]:
            return f"${names.setdefault(match['name'], len(names) + 1)}"
        return f"${next(places)}" if match["place"] else match[0]

    return Translated(_TOKENS.sub(replace, statement).encode(), tuple(names))


class Connection:
    """Adapts a psycopg connection to the protocol `app.stores.sql.database.Connection`."""

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw
        self.server = ""  # the id of the database; set by `begin_session`
        # Contexts that are left after the COMMIT of the transaction, such as a pipeline that also sends the COMMIT.
        self.ending = ExitStack()
        self.unconfirmed = False  # the last COMMIT was cancelled while it waited for a standby
        raw.add_notice_handler(self._note)

    def _note(self, notice: psycopg.errors.Diagnostic) -> None:
        # The server reports such a COMMIT as made, with a warning: it is made on this server alone.
        self.unconfirmed |= notice.source_function == "SyncRepWaitForLSN"

    def begin_session(self) -> None:
        self.raw.execute(SET_SESSION)
        ((self.server,),) = self.raw.execute(f"SELECT {DATABASE_ID}".encode())

    def close(self) -> None:
        self.raw.close()

    def rollback(self) -> None:
        try:
            self.raw.rollback()
        except psycopg.Error:
            self.close()

    def execute(self, statement: str, parameters: Parameters = (), /) -> psycopg.Cursor[Any]:
        found = translated(statement)
        return self.raw.execute(found.text, found.arguments(parameters))

    def executemany(self, statement: str, rows: Iterable[Sequence[object] | Mapping[str, object]], /) -> Any:
        cursor, found = self.raw.cursor(), translated(statement)
        cursor.executemany(found.text, [found.arguments(row) for row in rows])
        return cursor


def connection_parameters(url: str) -> dict[str, Any]:
    """The arguments of psycopg's `connect` for a connection to the server that accepts writes. On the new connection,
    execute `SET_SESSION` first. The arguments lack its settings, because PgBouncer refuses them in `options`."""
    conninfo = make_conninfo(**{**_DEFAULTS, **conninfo_to_dict(url)})
    return {"conninfo": conninfo, "autocommit": True, "prepare_threshold": 2, "context": _CONTEXT}


def connect(url: str, *, session: bool = True) -> Connection:
    """Connect to the server that accepts writes. `session`: execute `SET_SESSION`, too. Raises `StoreUnavailable`."""
    try:
        raw = psycopg.connect(**connection_parameters(url), cursor_factory=psycopg.RawCursor)
        if session:
            raw.execute(SET_SESSION)
    except psycopg.Error as error:
        raise unavailable(error) from error
    return Connection(raw)


def revision_of(connection: Connection) -> str | None:
    """The schema revision of a database; None if it has none. Raises `StoreUnavailable`."""
    try:
        row = connection.execute(SELECT_REVISION).fetchone()
    except errors.UndefinedTable:
        return None
    except psycopg.Error as error:
        raise unavailable(error) from error
    return None if row is None else str(row[0])


def unavailable(error: psycopg.Error) -> StoreUnavailable:
    """Convert an error (unreachable, locked, in recovery, …) to `StoreUnavailable`; a full disk to `StoreFull`."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, errors.DiskFull):
        return StoreFull(f"the database has no room to write: {text}")
    if error.sqlstate is not None:
        return StoreUnavailable(f"the database does not answer: {text}")
    # It may name the server's address and the account.
    return StoreUnavailable(f"the database does not answer: {text}", "no server that accepts writes can be reached")
