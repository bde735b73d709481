"""On PostgreSQL, too, an entry is rejected when its SQL does not compile, or reads the time."""

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from app.errors import RegistryError
from app.features.registry import Registry
from app.settings.parsers import PostgresUrl
from app.stores.postgres.connection import Connection, connect
from app.stores.postgres.features import DIALECT, check_features
from app.stores.sql.profile_statement import build
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


@pytest.mark.parametrize(
    ("selected", "value"),
    [
        ("/* the user's tips, as of :x */ COUNT(*)", 0),
        ("-- the user's tips :x ?\n COUNT(*)", 0),
        ("COALESCE(MAX(tip_id), 'a -> b :x ? ''/*')", "a -> b :x ? '/*"),
        ("COALESCE(MAX(tip_id), E'\\' :x ?')", "' :x ?"),
        ("COALESCE(MAX(tip_id), $a$it's :x ?$a$)", "it's :x ?"),
        ('(SELECT ":x?" FROM (SELECT COUNT(*) AS ":x?") AS counted)', 1),
        ("(ARRAY[COUNT(*), 7])[1:2]", [0, 7]),
    ],
)
def test_sql_is_computed_as_written_when_it_has_comments_or_literals(
    connection: Connection, selected: str, value: object
) -> None:
    odd = entry(name="odd", dtype="str", compute=f"SELECT MAX(user_id) AS user_id, {selected} AS value FROM views")
    registry = Registry([odd, entry(name="plain", compute="SELECT '' AS user_id, COUNT(*) AS value FROM views")])
    check_features(registry, connection)
    one = build(registry, DIALECT).one
    found = connection.execute(one, {"clock_ms": 0, "user_id": "ann", "mask": registry.full_mask}).fetchone()
    assert found is not None
    assert found[-2:] == (value, 0)


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
