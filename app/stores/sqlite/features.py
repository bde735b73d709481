"""Computes features in SQLite, and finds out which of the relations `views` and `feedback` their SQL reads. The SQL of
a feature is compiled twice. The first time, it is compiled alone, in a scratch database with only these relations. It
is rejected if it names an event table or a catalogue, has a parameter or a second statement, or calls a function that
depends on more than its arguments. SQLite's authorizer reports the relations that it reads. The second time, it is
compiled in the real statement, against the migrated schema. The plan must search an index."""

import sqlite3
from contextlib import closing
from functools import cache

from app.errors import RegistryError
from app.features.events import KNOWN_SUBJECTS, RELATIONS
from app.features.registry import Feature, Registry
from app.stores.sql.profile_statement import Dialect, build
from app.stores.sql.source import SqlSource
from app.stores.sqlite.connection import error_name
from app.telemetry import logger

_SCRATCH = """
CREATE TABLE views (user_id TEXT, tip_id TEXT, occurred_at_ms INTEGER, local_hour INTEGER, decision_id TEXT);
CREATE TABLE feedback (user_id TEXT, tip_id TEXT, occurred_at_ms INTEGER, local_hour INTEGER,
                       action TEXT, dwell_ms INTEGER, decision_id TEXT);
"""
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_CATALOGUES = ("sqlite_", "pragma_")
# With some arguments they read the clock or the machine's time zone. PostgreSQL has none of them.
_DATES = {"date", "time", "datetime", "julianday", "unixepoch", "strftime", "timediff"}
_DETERMINISTIC = 0x800  # https://sqlite.org/c3ref/c_deterministic.html
# Primary result codes of faults of the database, not of the SQL: https://sqlite.org/rescode.html
_CODES = ("BUSY", "LOCKED", "NOMEM", "READONLY", "IOERR", "CORRUPT", "FULL", "CANTOPEN", "NOTADB")
_DATABASE_FAULTS = tuple(f"SQLITE_{code}" for code in _CODES)
# The index of the log is by user and subject, so the newest event of each subject is sought.
_NEWEST = """COALESCE((SELECT MAX(seq) FROM event_log WHERE user_id = asked.user_id AND subject = '{}'),
            -(SELECT erasures FROM bandit_ledger))"""
DIALECT = Dialect(
    items="json_each(:asked) AS item",
    # If a feature's SQL returns several rows for a user, the value is an empty blob, which is invalid for every dtype.
    value="CASE COUNT(*) WHEN 1 THEN MAX(value) WHEN 0 THEN NULL ELSE x'' END",
    version=f"MAX({', '.join(_NEWEST.format(subject) for subject in sorted(KNOWN_SUBJECTS))}) AS version",
)
log = logger("stores.features")


class SqliteSource(SqlSource):
    dialect = DIALECT
    errors = sqlite3.Error

    def is_database_fault(self, error: sqlite3.Error) -> bool:
        return error_name(error).startswith(_DATABASE_FAULTS)

    def interrupted(self, error: sqlite3.Error) -> bool:
        return error_name(error) == "SQLITE_INTERRUPT"


def compile_registry(registry: Registry) -> Registry:
    """Compile the SQL of each entry separately. Each entry of the returned registry also names the relations that its
    SQL reads, and the kinds of events that change these relations. Raises `RegistryError` if the SQL or the
    `invalidated_by` of an entry is invalid."""
    compiled = Registry(entry.compiled(_relations_of(entry)) for entry in registry)
    for entry in compiled:
        for subject in sorted(set(entry.invalidated_by) - {RELATIONS[name] for name in entry.relations}):
            log.warning(
                "superfluous_subject",
                feature=entry.name,
                subject=subject,
                detail="its events delete cached values that they cannot change; remove it from invalidated_by",
            )
    return compiled


def check_features(registry: Registry, connection: sqlite3.Connection) -> None:
    """Compile the SQL of every entry of a compiled registry against a migrated database. Raises `RegistryError` if the
    SQL of an entry does not compile, or its plan scans the events of all users."""
    for entry in registry:
        statements, parameters = build(Registry([entry]), DIALECT), {"clock_ms": 0, "asked": "[]"}
        plan: list[tuple[object, ...]] = []
        try:
            for statement in (statements.live, statements.past):
                plan += connection.execute("EXPLAIN QUERY PLAN " + statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise RegistryError(entry.name, _explained(error)) from error
        for *_, step in plan:
            if str(step).startswith(("SCAN tip_views", "SCAN tip_feedback")):
                raise RegistryError(entry.name, f"its plan reads the events of all users ({step})")


def _relations_of(entry: Feature) -> set[str]:
    read: set[str] = set()

    def authorize(action: int, table: str | None, column: str | None, schema: str | None, source: str | None) -> int:
        allowed = action in _ALLOWED
        if action == sqlite3.SQLITE_READ:
            allowed = not (table or "").lower().startswith(_CATALOGUES)
            read.add(table or "")
        elif action == sqlite3.SQLITE_FUNCTION:  # its name is passed as the column
            allowed = (column or "").lower() in _pure_functions()
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    with closing(sqlite3.connect(":memory:")) as scratch:
        scratch.executescript(_SCRATCH)
        scratch.set_authorizer(authorize)
        try:
            # Explained, not executed: a text may recurse without end.
            program = scratch.execute(f"EXPLAIN {entry.compute}").fetchall()
            scratch.set_authorizer(None)
            # The authorizer does not see a table that is joined with USING alone, but the program opens it.
            pages = dict(scratch.execute("SELECT rootpage, tbl_name FROM sqlite_schema").fetchall())
            read |= {pages[page] for _, opcode, _, page, *_ in program if opcode == "OpenRead" and page in pages}
            scratch.execute(f"CREATE TEMP VIEW checked AS {entry.compute}")
            columns = [name for _, name, *_ in scratch.execute("PRAGMA table_info(checked)")]
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise RegistryError(entry.name, _explained(error)) from error
    if columns != ["user_id", "value"]:
        raise RegistryError(entry.name, f"the SQL must yield (user_id, value), not ({', '.join(columns)})")
    return read & RELATIONS.keys()


@cache
def _pure_functions() -> frozenset[str]:
    """The functions whose result depends only on their arguments, or in the case of aggregates only on their rows."""
    with closing(sqlite3.connect(":memory:")) as scratch:
        rows = scratch.execute("SELECT name, type, flags FROM pragma_function_list WHERE builtin").fetchall()
    # Aggregates and window functions (types a and w) have no flag, but all built-in ones are deterministic.
    return frozenset(name.lower() for name, kind, flags in rows if kind != "s" or flags & _DETERMINISTIC) - _DATES


def _explained(error: Exception) -> str:
    text = str(error)
    if "not authorized to use function" in text:
        return f"the SQL may not read the time or random numbers ({text}): a value depends on time only by its window"
    if any(reason in text for reason in ("no such table", "prohibited", "vtable constructor failed")):
        return f"the SQL may read only the relations views and feedback, never a table directly ({text})"
    if "not authorized" in text:
        return f"the SQL must be one SELECT over views and feedback ({text})"
    if "binding" in text.lower():
        rule = "the SQL may use no parameter, not even :now_ms"
        return f"{rule} ({text}): its relations hold only the events of the window"
    if "one statement at a time" in text or 'near ";"' in text:
        return "the SQL must be one statement, without a semicolon"
    return f"the SQL does not compile: {text}"
