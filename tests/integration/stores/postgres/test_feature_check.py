"""On PostgreSQL, too, an entry is rejected when its SQL reads more than its relations, or the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from app.errors import RegistryError
from app.features.registry import Registry
from app.settings.parsers import PostgresUrl
from app.stores.postgres.connection import Connection, connect
from app.stores.postgres.feature_check import check_features
from tests.support.entries import entry
from tests.support.registry import REGISTRY

PLANS = ("enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan")
REFUSED = {
    "does not compile": [
        "SELECT user_id, COUNT(* AS value FROM views",
        "SELECT user_id, mood AS value FROM views",
        "SELECT user_id, received_at_ms AS value FROM views",
        "SELECT user_id, COUNT(*) AS value FROM views",  # user_id is not grouped
    ],
    "only the relations views and feedback": [
        f"SELECT user_id, 1 AS value FROM {table}" for table in ("tip_views", "event_log", "public.tip_views", "users")
    ]
    + ["SELECT relname AS user_id, 1 AS value FROM pg_class"],
    "one statement": ["SELECT user_id, 1 AS value FROM views; SELECT 1", "SELECT user_id, 1 AS value FROM views;"],
    "may not read the time": [
        f"SELECT user_id, MAX({value}) AS value FROM views GROUP BY user_id"
        for value in (
            "CAST(EXTRACT(EPOCH FROM now()) AS BIGINT)",
            "CAST(CURRENT_TIMESTAMP AS TEXT)",
            "CAST(DATE 'now' AS TEXT)",
            "random()",
            "pg_backend_pid()",
        )
    ],
    "must yield (user_id, value)": [
        "SELECT user_id FROM views",
        "SELECT 1 AS value, user_id FROM views",
        "SELECT user_id, 1 AS value, 2 AS more FROM views",
    ],
}


@pytest.fixture
def connection(postgres_url: PostgresUrl) -> Iterator[Connection]:
    opened = connect(postgres_url.url)
    with closing(opened.raw):
        yield opened


@pytest.mark.parametrize("reason", REFUSED)
def test_entry_is_refused_when_its_sql_breaks_a_rule(connection: Connection, reason: str) -> None:
    for compute in REFUSED[reason]:
        with pytest.raises(RegistryError) as caught:
            check_features(Registry([entry(name="sound"), entry(name="broken", compute=compute)]), connection)
        assert str(caught.value).startswith("feature 'broken': ")
        assert reason in str(caught.value), compute


@pytest.mark.parametrize("kept", PLANS)
def test_registry_is_accepted_whatever_plan_is_chosen(connection: Connection, kept: str) -> None:
    """Statistics decide whether PostgreSQL searches an index by one scan or another."""
    for plan in PLANS:
        connection.execute(f"SET {plan} = {'on' if plan == kept else 'off'}")
    check_features(REGISTRY, connection)


def test_checking_leaves_nothing_behind(connection: Connection) -> None:
    check_features(REGISTRY, connection)
    assert connection.execute("SELECT COUNT(*) FROM pg_class WHERE relname IN ('checked', 'feedback')").fetchone() == (
        0,
    )
    assert connection.raw.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
