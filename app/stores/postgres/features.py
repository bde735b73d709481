"""Computes features in PostgreSQL, and checks their SQL, which `app.stores.sqlite.features` has compiled before. Here
it is compiled twice. First, as a temporary view over the relations `views` and `feedback`: the view's parse tree names
every function that the SQL calls, and the SQL is rejected if one is not immutable. Second, in the real statement, whose
plan must search an index by user. Both transactions are rolled back."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import errors

from app.errors import RegistryError, StoreUnavailable
from app.features.registry import Feature, Registry
from app.stores.postgres.connection import Connection
from app.stores.sql.profile_statement import TABLES, Dialect, build
from app.stores.sql.source import SqlSource

SCRATCH = (
    "BEGIN",
    """CREATE TEMP VIEW views AS
        SELECT user_id, tip_id, occurred_at_ms, utc_offset_min AS local_hour, decision_id FROM tip_views""",
    """CREATE TEMP VIEW feedback AS
        SELECT user_id, tip_id, occurred_at_ms, utc_offset_min AS local_hour, action, dwell_ms, decision_id
        FROM tip_feedback""",
    "SET LOCAL search_path = pg_temp, pg_catalog",
)
PLANNING = ("BEGIN", "SET LOCAL enable_seqscan = off")  # a small table would be read as a whole
SELECT_TREE = "SELECT CAST(ev_action AS text) FROM pg_rewrite WHERE ev_class = CAST('pg_temp.checked' AS regclass)"
SELECT_VOLATILE = "SELECT proname FROM pg_proc WHERE oid = ANY(CAST(? AS bigint[])) AND provolatile <> 'i'"
_FUNCTION = re.compile(r":(?:funcid|opfuncid|aggfnoid|winfnoid|resultfunc) (\d+)")
# `CURRENT_TIMESTAMP` and its like, and the types date, time, timestamp, timestamptz and timetz: 'now' is one.
_TIME = re.compile(r"SQLVALUEFUNCTION|:(?:const|result|funcresult|opresult|var)type (?:1082|1083|1114|1184|1266)\b")
# Classes of faults of the server, not of the SQL: https://www.postgresql.org/docs/current/errcodes-appendix.html
_DATABASE_FAULTS = {"08", "53", "55", "57", "58"}
DIALECT = Dialect(
    items="json_array_elements(CAST(:asked AS json)) WITH ORDINALITY AS item (value, key)",
    # Several rows for a user are an error of the SQL.
    value="value",
    version="""COALESCE((SELECT MAX(seq) FROM event_log WHERE user_id = asked.user_id),
            -(SELECT erasures FROM bandit_ledger)) AS version""",
)


class PostgresSource(SqlSource):
    dialect = DIALECT
    errors = psycopg.Error

    def fetch(self, connection: Connection, statement: str, parameters: dict[str, object]) -> list[Any]:
        if connection.raw.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            return connection.execute(statement, parameters).fetchall()
        with connection.raw.transaction():  # a savepoint
            return connection.execute(statement, parameters).fetchall()

    def is_database_fault(self, error: psycopg.Error) -> bool:
        state = error.sqlstate
        return state is None or (state[:2] in _DATABASE_FAULTS and not self.interrupted(error))

    def interrupted(self, error: psycopg.Error) -> bool:
        return isinstance(error, errors.QueryCanceled)


def check_features(registry: Registry, connection: Connection) -> None:
    """Compile the SQL of every entry against a migrated database. Raises `RegistryError` if the SQL of an entry does
    not compile, if it depends on more than the rows of its relations, or if its plan scans the events of all users;
    `StoreUnavailable` if the role may not create temporary tables."""
    for entry in registry:
        for setup, check in ((SCRATCH, _check_alone), (PLANNING, _check_plans)):
            try:
                _begin(connection, setup)
                check(entry, connection)
            except (errors.ProgrammingError, errors.DataError, errors.NotSupportedError) as error:
                reason = str(error).partition("\n")[0]
                raise RegistryError(entry.name, f"the SQL does not compile on PostgreSQL: {reason}") from error
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
    ((tree,),) = connection.execute(SELECT_TREE)
    functions = [int(oid) for oid in _FUNCTION.findall(tree)]
    found = [f"{name} is not immutable" for (name,) in connection.execute(SELECT_VOLATILE, (functions,))]
    if _TIME.search(tree):
        found.append("it uses the types or functions of dates and times")
    if found:
        reason = f"the SQL may not read the time or random numbers ({found[0]})"
        raise RegistryError(entry.name, f"{reason}: a value depends on time only by its window")


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
