"""Start-up checks of the registry that need SQL: does each entry compile, and does it see only what it may?

Each text is compiled twice. First alone, against a scratch database that has nothing but `views` and `feedback`: what
names an event table, a catalogue, a parameter other than `:now_ms`, a second statement or a clock of SQLite's own
fails here. Then inside the real statement, against the migrated schema.
"""

from __future__ import annotations

import re
import sqlite3

from app.errors import RegistryError
from app.features.registry import Feature, Registry
from app.stores.sqlite.profile_statement import build

_SCRATCH = """
CREATE TABLE views (user_id TEXT, tip_id TEXT, occurred_at_ms INTEGER, local_hour INTEGER, decision_id TEXT);
CREATE TABLE feedback (user_id TEXT, tip_id TEXT, occurred_at_ms INTEGER, local_hour INTEGER,
                       action TEXT, dwell_ms INTEGER, decision_id TEXT);
"""
# What the date functions take for the time or the zone of the machine: 'now' said, or left out.
_CLOCKS = re.compile(
    r"""['"](?:now|localtime|utc)['"]|\b(?:date|time|datetime|julianday|unixepoch)\s*\(\s*\)|\bstrftime\s*\([^,()]*\)""",
    re.IGNORECASE,
)
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_CATALOGUES = ("sqlite_", "pragma_")
# Functions that depend on more than their arguments, or reach out of the database.
_IMPURE = {
    *("current_date", "current_time", "current_timestamp", "random", "randomblob"),
    *("changes", "total_changes", "last_insert_rowid", "load_extension"),
}


def check_features(registry: Registry, connection: sqlite3.Connection) -> None:
    """Compile every entry against `connection`, a migrated database.

    Raises:
        RegistryError: naming the entry and what is wrong with its SQL.
    """
    for entry in registry:
        _check_alone(entry)
    for entry in registry:
        try:
            connection.execute("EXPLAIN " + build(Registry([entry])), {"clock_ms": 0, "asked": "[]"}).fetchall()
        except sqlite3.Error as error:
            raise RegistryError(entry.name, _explained(error)) from error


def _check_alone(entry: Feature) -> None:
    if found := _CLOCKS.search(entry.compute):
        raise RegistryError(entry.name, f"the SQL must take the time from :now_ms alone, and uses {found[0]}")
    scratch = sqlite3.connect(":memory:")
    try:
        scratch.executescript(_SCRATCH)
        scratch.set_authorizer(_authorize)
        try:
            cursor = scratch.execute(entry.compute, {"now_ms": 0})
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise RegistryError(entry.name, _explained(error)) from error
        columns = [column[0] for column in cursor.description or ()]
        if columns != ["user_id", "value"]:
            raise RegistryError(entry.name, f"the SQL must yield (user_id, value), not ({', '.join(columns)})")
    finally:
        scratch.close()


def _authorize(action: int, table: str | None, column: str | None, schema: str | None, source: str | None) -> int:
    allowed = action in _ALLOWED
    if action == sqlite3.SQLITE_READ:
        allowed = not (table or "").lower().startswith(_CATALOGUES)
    elif action == sqlite3.SQLITE_FUNCTION:  # its name stands where a column's would
        allowed = (column or "").lower() not in _IMPURE
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _explained(error: Exception) -> str:
    text = str(error)
    if "not authorized to use function" in text:
        return f"the SQL may depend on nothing but its relations and :now_ms ({text})"
    if any(reason in text for reason in ("no such table", "prohibited", "vtable constructor failed")):
        return f"the SQL may read only the relations views and feedback, never a table directly ({text})"
    if "not authorized" in text:
        return f"the SQL must be one SELECT over views and feedback ({text})"
    if "binding" in text.lower():
        return f"the SQL may use no parameter but :now_ms ({text})"
    if "one statement at a time" in text or 'near ";"' in text:
        return "the SQL must be one statement, without a semicolon"
    return f"the SQL does not compile: {text}"
