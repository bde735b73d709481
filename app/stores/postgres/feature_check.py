"""Compiles the SQL of features on PostgreSQL.

The SQL of a feature is compiled twice. The first time, it is compiled alone, as a temporary view over temporary tables
with the columns of the relations `views` and `feedback`. The view's parse tree names every table that it reads and
every function that it calls: it is rejected if it reads another table, or calls a function that is not immutable. The
second time, it is compiled in the real statement, whose plan must search an index by user. Nothing is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import errors

from app.errors import RegistryError, StoreUnavailable
from app.features.events import RELATIONS
from app.features.registry import Feature, Registry
from app.stores.postgres.connection import Connection
from app.stores.postgres.source import DIALECT
from app.stores.sql.profile_statement import TABLES, build

SCRATCH = (
    "BEGIN",
    """CREATE TEMP TABLE views (
        user_id text COLLATE "C", tip_id text COLLATE "C", occurred_at_ms bigint, local_hour bigint,
        decision_id text COLLATE "C"
    )""",
    """CREATE TEMP TABLE feedback (
        user_id text COLLATE "C", tip_id text COLLATE "C", occurred_at_ms bigint, local_hour bigint,
        action text COLLATE "C", dwell_ms bigint, decision_id text COLLATE "C"
    )""",
    "SET LOCAL search_path = pg_temp, pg_catalog",
)
PLANNING = ("BEGIN", "SET LOCAL enable_seqscan = off")  # a small table would be read as a whole
SELECT_COLUMNS = """
SELECT attname FROM pg_attribute WHERE attrelid = CAST('pg_temp.checked' AS regclass) ORDER BY attnum
"""
SELECT_TREE = "SELECT CAST(ev_action AS text) FROM pg_rewrite WHERE ev_class = CAST('pg_temp.checked' AS regclass)"
SELECT_TABLES = """
SELECT CAST(CAST(oid AS regclass) AS text) FROM pg_class
WHERE oid = ANY(CAST(? AS bigint[])) AND oid NOT IN (CAST('pg_temp.checked' AS regclass),
    CAST('pg_temp.views' AS regclass), CAST('pg_temp.feedback' AS regclass))
"""
SELECT_VOLATILE = "SELECT proname FROM pg_proc WHERE oid = ANY(CAST(? AS bigint[])) AND provolatile <> 'i'"
_TABLE = re.compile(r":relid (\d+)")
_FUNCTION = re.compile(r":(?:funcid|opfuncid|aggfnoid|winfnoid|resultfunc) (\d+)")
# `CURRENT_TIMESTAMP` and its like, and the types date, time, timestamp, timestamptz and timetz: 'now' is one.
_TIME = re.compile(r"SQLVALUEFUNCTION|:(?:const|result|funcresult|opresult|var)type (?:1082|1083|1114|1184|1266)\b")


def check_features(registry: Registry, connection: Connection) -> None:
    """Compile the SQL of every entry against a migrated database.

    Raises:
        RegistryError: the SQL of an entry does not compile, reads more than its relations or depends on more than
            their rows; or its plan scans the events of all users.
        StoreUnavailable: the role may not create temporary tables.
    """
    for entry in registry:
        for setup, check in ((SCRATCH, _check_alone), (PLANNING, _check_plans)):
            try:
                _begin(connection, setup)
                check(entry, connection)
            except (errors.ProgrammingError, errors.DataError, errors.NotSupportedError) as error:
                raise RegistryError(entry.name, _explained(error)) from error
            finally:
                connection.raw.execute("ROLLBACK")


def _begin(connection: Connection, setup: Sequence[str]) -> None:
    try:
        for statement in setup:
            connection.raw.execute(statement.encode())
    except errors.InsufficientPrivilege as error:
        reason = f"the SQL of features cannot be checked: {str(error).strip()}"
        raise StoreUnavailable(f"{reason}; GRANT TEMPORARY on the database to the role") from error


def _check_alone(entry: Feature, connection: Connection) -> None:
    # Prepared: PostgreSQL then rejects a second statement.
    connection.raw.execute(f"CREATE TEMP VIEW checked AS {entry.compute}".encode(), prepare=True)
    columns = [name for (name,) in connection.execute(SELECT_COLUMNS)]
    if columns != ["user_id", "value"]:
        raise RegistryError(entry.name, f"the SQL must yield (user_id, value), not ({', '.join(columns)})")
    ((tree,),) = connection.execute(SELECT_TREE)
    for (table,) in connection.execute(SELECT_TABLES, ([int(oid) for oid in _TABLE.findall(tree)],)):
        raise RegistryError(entry.name, _only_relations(table))
    for (name,) in connection.execute(SELECT_VOLATILE, ([int(oid) for oid in _FUNCTION.findall(tree)],)):
        raise RegistryError(entry.name, _only_immutable(f"{name} is not immutable"))
    if _TIME.search(tree):
        raise RegistryError(entry.name, _only_immutable("it uses the types or functions of dates and times"))


def _check_plans(entry: Feature, connection: Connection) -> None:
    statements = build(Registry([entry]), DIALECT)
    values = {"clock_ms": 0, "asked": '[["", 1, 0, null, null]]', "user_id": "", "mask": 1}
    for statement in (statements.one, statements.live, statements.past):
        ((plan,),) = connection.execute(f"EXPLAIN (FORMAT JSON) {statement}", values)
        for step in _steps(plan[0]["Plan"]):
            condition = step.get("Index Cond") or step.get("Recheck Cond", "")  # of a bitmap scan
            if step.get("Relation Name") in TABLES.values() and "user_id = " not in condition:
                raise RegistryError(entry.name, f"its plan reads the events of all users ({step['Node Type']})")


def _steps(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for step in plan.get("Plans", ()):
        yield from _steps(step)


def _only_relations(table: str) -> str:
    return f"the SQL may read only the relations {' and '.join(RELATIONS)}, never a table directly ({table})"


def _only_immutable(reason: str) -> str:
    return f"the SQL may not read the time or random numbers ({reason}): a value depends on time only by its window"


def _explained(error: psycopg.Error) -> str:
    text = str(error).partition("\n")[0]
    if isinstance(error, errors.UndefinedTable):
        return _only_relations(text)
    if "multiple commands" in text or 'at or near ";"' in text:
        return "the SQL must be one statement, without a semicolon"
    return f"the SQL does not compile on PostgreSQL: {text}"
