"""On PostgreSQL, too, statements search an index; those about one user touch the partition of that user alone."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from psycopg import sql

from app.settings.parsers import postgres_url as parsed
from app.stores.postgres import event_log as postgres_log
from app.stores.postgres.connection import Connection, connect, translated
from app.stores.sql import decisions, event_log, learning, shadows, sufficient_statistics, users
from app.stores.sql.database import Parameters
from tests.support.postgres import TEMPLATE, PostgresServer
from tests.unit.stores.sqlite.test_migrations import statements
from tests.unit.stores.sqlite.test_query_plan import SHADOW as NO_SHADOW
from tests.unit.stores.sqlite.test_query_plan import STATEMENTS

PARTITIONED = ("event_log", "outbox", "tip_views", "tip_feedback", "bandit_states", "tip_scores", "decision_events")
FILL = (
    """INSERT INTO event_log (seq, event_id, subject, user_id, digest, occurred_at_ms, received_at_ms)
    SELECT n, 'e' || n, CASE n % 2 WHEN 0 THEN 'signals.tip.served' ELSE 'signals.tip.feedback' END,
        'user-' || n % 5000, '', n * 1000, n * 1000 FROM generate_series(1, 100000) AS n""",
    "INSERT INTO outbox SELECT seq, user_id, received_at_ms, 0 FROM event_log WHERE seq > 98000",
    """INSERT INTO tip_views SELECT seq, user_id, 'tip', occurred_at_ms, 0, received_at_ms, NULL FROM event_log
    WHERE seq % 2 = 0""",
    """INSERT INTO tip_feedback SELECT seq, user_id, 'tip', occurred_at_ms, 0, received_at_ms, NULL, 'completed', 1
    FROM event_log WHERE seq % 2 = 1""",
    "INSERT INTO bandit_states SELECT 'user-' || n, 'spec', '', 1, 1 FROM generate_series(0, 4999) AS n",
    """INSERT INTO tip_scores (decision_id, request_id, user_id, created_at_ms, explore, role, served_by, policy_hash,
        spec_hash, state_version, prior_version, profile_origin, profile_present, chosen, chosen_id, elapsed_us, state,
        served_at_ms, champion_p, theta, phi, request)
    SELECT 'd' || n, 'r' || n, 'user-' || n % 5000, n * 1000, 1, 'champion', 'p', 'p', 'spec', 1, 1, 'absent', 0, 0,
        't' || n % 7, 1, CASE WHEN n > 95000 THEN 'served' WHEN n > 90000 THEN 'open' ELSE 'learned' END, n * 1000, 0.5,
        '', '', '{"profile": null}' FROM generate_series(1, 100000) AS n""",
    """INSERT INTO bandit_priors (spec_hash, mu, users, decisions, changes, created_at_ms)
    SELECT 'another', '', 1, 1, n, n FROM generate_series(1, 5000) AS n""",
    "INSERT INTO decision_events SELECT n, 'user-' || n % 5000, n, 'served' FROM generate_series(1, 100000) AS n",
)
USER = "user-77"
# Statements of SQLite alone, one whose parameters are never NULL, and those that read every row of this data.
OTHERS = {"known events", "states to grow", "states of a spec"}
_RANKINGS = dict.fromkeys(("champion_scores", "champion_pi", "challenger_scores", "challenger_pi"), b"")
SHADOW = {**dict.fromkeys(NO_SHADOW, 0.5), **_RANKINGS, "agree": 1, "user_id": USER, "number": 77}
LEARNED = {
    "served_at_ms": 1,
    "reward": 0.5,
    "source": "feedback",
    "action": "completed",
    "now": 1,
    "user": USER,
    "number": 77,
}
OF_ONE_USER: dict[str, tuple[str, Parameters]] = {
    "statistics": (sufficient_statistics.SELECT_STATE, (USER,)),
    "versions": (decisions.SELECT_ERASURES_AND_VERSIONS, (json.dumps([USER]),)),
    "decision by request": (decisions.SELECT_BY_REQUEST, (USER, "r77")),
    "newest decisions": (
        decisions.SELECT_NEWEST_OF_USER,
        {"user": USER, "since": 0, "until": 10**9, "number": 10**9, "limit": 51},
    ),
    "events of a decision": (decisions.SELECT_EVENTS, {"user_id": USER, "number": 77}),
    "is unsettled": (learning.SELECT_IS_UNSETTLED, (USER, "t3")),
    "is decision": (learning.SELECT_IS_DECISION, ("d77", USER)),
    "sender": (learning.SELECT_SENT_BY, (USER, 77)),
    "named decision": (learning.SELECT_NAMED, {"decision": "d77", "user": USER, "seq": 1}),
    "newest decision": (learning.SELECT_NEWEST, {"user": USER, "tip": "t3", "latest": 10**9, "seq": 1}),
    "learned decisions": (learning.SELECT_LEARNED, (USER,)),
    "served": (learning.UPDATE_SERVED, (1, USER, 77)),
    "learned": (learning.UPDATE_LEARNED, LEARNED),
    "missing shadows": (shadows.SELECT_OF_USER, {"spec": "spec", "user": USER, "version": 1}),
    "shadow": (shadows.UPDATE_SHADOW, SHADOW),
    "shadow of the pool": (shadows.INSERT_POOL, SHADOW),
    "newest events": (users.SELECT_NEWEST_TRACED, {"user": USER, "limit": 50}),
    "activity": (users.SELECT_ACTIVITY, {"user": USER, "until": 10**9, "days": 30}),
    "known events": (postgres_log.SELECT_KNOWN, (json.dumps([[USER, "e77"]]),)),
    "newest of a user": (users.SELECT_NEWEST, (json.dumps([USER]), '["signals.tip.served"]')),
}


@contextmanager
def filled(postgres: PostgresServer, partitions: int) -> Iterator[Connection]:
    """A connection to a database with 100,000 events and decisions of 5,000 users. 0: without partitions."""
    name = f"plans{partitions}"
    postgres.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    opened = connect(parsed(postgres.url(name)).url)
    opened.raw.prepare_threshold = None
    for table in PARTITIONED if partitions else ():
        opened.execute(f"ALTER TABLE {table} RENAME TO whole")
        opened.execute(f"CREATE TABLE {table} (LIKE whole INCLUDING ALL) PARTITION BY HASH (user_id)")
        opened.execute("DROP TABLE whole")
        for number in range(partitions):
            bounds = f"WITH (MODULUS {partitions}, REMAINDER {number})"
            opened.execute(f"CREATE TABLE {table}_p{number} PARTITION OF {table} FOR VALUES {bounds}")
    for statement in FILL:
        opened.execute(statement)
    opened.execute("VACUUM ANALYZE")
    yield opened
    opened.raw.close()
    postgres.execute(f"DROP DATABASE {name}")


@pytest.fixture(scope="module")
def connection(postgres: PostgresServer) -> Iterator[Connection]:
    with filled(postgres, 0) as opened:
        yield opened


@pytest.fixture(scope="module")
def partitions(postgres: PostgresServer) -> Iterator[Connection]:
    with filled(postgres, 8) as opened:
        yield opened


def scans(connection: Connection, statement: str, parameters: Parameters, options: str) -> list[dict[str, Any]]:
    """The steps of the generic plan that read or write a table."""
    found = translated(statement)
    text, values = found.text, found.arguments(parameters)
    types = ", ".join("bigint" if isinstance(value, int) else "unknown" for value in values)
    given = sql.SQL(", ").join(map(sql.Literal, values))
    connection.raw.execute(f"PREPARE tried{f' ({types})' if types else ''} AS ".encode() + text)
    connection.raw.execute("BEGIN")
    try:
        executed = sql.SQL("EXECUTE tried ({})").format(given) if values else sql.SQL("EXECUTE tried")
        (plan,) = connection.raw.execute(sql.SQL(f"EXPLAIN ({options} FORMAT JSON) ") + executed).fetchone()  # type: ignore[misc]
    finally:
        connection.raw.execute("ROLLBACK")
        connection.raw.execute("DEALLOCATE tried")
    steps: list[dict[str, Any]] = []
    waiting = [plan[0]["Plan"]]
    while waiting:
        step = waiting.pop()
        waiting += step.get("Plans", [])
        if "Relation Name" in step:
            steps.append(step)
    return steps


def whole_tables(steps: list[dict[str, Any]]) -> set[str]:
    """The large tables that are read from beginning to end. The outbox is small."""
    names = {re.sub(r"_p\d$", "", step["Relation Name"]) for step in steps if step["Node Type"] == "Seq Scan"}
    return names & {*PARTITIONED, "bandit_priors"} - {"outbox"}


def test_every_statement_is_prepared(connection: Connection) -> None:
    """Also with no type of any parameter given, as for NULL."""
    names = set()
    for name, statement in statements("sql"):
        prepared = re.sub(rb"\$\d+", b"NULL", translated(statement).text)
        connection.raw.execute(b"EXPLAIN " + prepared)
        names.add(name)
    assert {"users.SELECT_ELIGIBLE", "rollout.SELECT_SHOWN", "samples.UPSERT_STATUS"} < names


@pytest.mark.parametrize("name", sorted(STATEMENTS.keys() - OTHERS))
def test_statement_searches_an_index(connection: Connection, name: str) -> None:
    statement, parameters, _ = STATEMENTS[name]
    assert not whole_tables(scans(connection, statement, parameters, ""))


@pytest.mark.parametrize("name", ["closed", "unserved", "still closed", "expired"])
def test_settling_reads_the_outbox_by_key(connection: Connection, name: str) -> None:
    statement, parameters, _ = STATEMENTS[name]
    steps = scans(connection, statement, parameters, "")
    searched = [step for step in steps if step["Relation Name"] in ("event_log", "outbox")]
    assert len(searched) == 3, "and the oldest row of the outbox"
    assert all(step["Node Type"].startswith("Index") for step in searched)
    conditions = [step.get("Index Cond", "") for step in searched if step["Relation Name"] == "event_log"]
    assert all("user_id = decision.user_id" in condition and "seq >=" in condition for condition in conditions)


@pytest.mark.parametrize("since", [0, 10**9])
def test_page_of_eligible_users_reads_one_row_of_each(connection: Connection, since: int) -> None:
    parameters = {"after": "", "since": since, "until": 10**9, "limit": 20}
    steps = scans(connection, users.SELECT_ELIGIBLE, parameters, "ANALYZE,")
    page = 5_000 if since else 20  # if no user is eligible, all are looked at
    assert max(step["Actual Loops"] for step in steps) <= page + 1
    assert max(step["Actual Rows"] for step in steps) <= 1


@pytest.mark.parametrize("name", OF_ONE_USER)
def test_statement_about_one_user_touches_one_partition(partitions: Connection, name: str) -> None:
    statement, parameters = OF_ONE_USER[name]
    steps = scans(partitions, statement, parameters, "ANALYZE,")
    touched = {step["Relation Name"] for step in steps if step["Actual Loops"] and step["Node Type"] != "ModifyTable"}
    assert len({name[-1] for name in touched if re.search(r"_p\d$", name)}) == 1, touched
    assert not whole_tables([step for step in steps if step["Actual Loops"]])


def test_consumed_events_are_found_in_the_partitions_of_their_users(partitions: Connection) -> None:
    """A job names events by number. The numbers lead to the users, and these to the partitions."""
    steps = scans(partitions, event_log.SELECT_LOGGED, ("[100000]",), "ANALYZE,")
    of_users = [step["Relation Name"] for step in steps if step["Actual Loops"]]
    assert len({name for name in of_users if name.startswith("event_log")}) == 1
    assert len([name for name in of_users if name.startswith("outbox")]) == 8
