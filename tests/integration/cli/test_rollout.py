"""`profiles rollout`: the same figures and the same moves as the page, beside a running service or without one."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.features.clock import SystemClock
from app.settings import Settings
from app.stores.sql.access import SqlAuditTrail
from app.stores.sqlite.database import SqliteDatabase
from tests.integration.cli.conftest import Run, rows_shown
from tests.support.audit import newest_entries
from tests.support.bandit_process import rollout_of
from tests.support.decisions import rows_of, some, write


async def look(path: Path, rows: Sequence[dict[str, object]]) -> None:
    database, settings, clock = await SqliteDatabase.open(path, 1), Settings(), SystemClock()
    await write(database, rows)
    rollout = rollout_of(settings, database, clock)
    await rollout.watch()
    await database.close()


async def outcomes(path: Path) -> list[tuple[str, str, str]]:
    """What the audit trail holds, oldest first."""
    database = await SqliteDatabase.open(path, 1)
    entries = await newest_entries(SqlAuditTrail(database), 10)
    await database.close()
    return [(entry.actor, entry.action, entry.outcome) for entry in reversed(entries)]


def test_status_is_shown_without_decisions(profiles: Run, database_path: Path) -> None:
    shown = profiles("rollout", "status", database=database_path)
    assert shown.code == 0
    rows = rows_shown(shown.out)
    assert (rows["stage"], rows["share"], rows["figures"]) == ("shadow", "0", "none")
    assert (rows["guardrails: p99 ms: value"], rows["guardrails: p99 ms: judged"]) == ("none", "no")
    assert rows["verdict: verdict"] == "insufficient data"
    assert "move ramp, allowed no, why not insufficient data: 0 decisions can be evaluated" in shown.out
    assert "move rollback, allowed yes" in shown.out
    found = profiles("rollout", "status", "--json", database=database_path).json
    assert (found["stage"], found["figures"]) == ("shadow", None)


@pytest.mark.slow
def test_ramp_and_rollback_are_audited(profiles: Run, database_path: Path) -> None:
    refused = profiles("rollout", "ramp", database=database_path)
    assert refused.code == 5
    assert "insufficient data: 0 decisions" in refused.err
    asyncio.run(look(database_path, rows_of(some(4_000))))
    shown = profiles("rollout", "ramp", "--reason", "looks [good]", database=database_path)
    assert shown.code == 0
    rows = rows_shown(shown.out)
    assert (rows["stage"], rows["share"]) == ("ramp", "0.05")
    assert (rows["changed by"], rows["reason"]) == ("the command line", "looks [good]")
    assert "200 are needed" in shown.out
    found = profiles("rollout", "status", "--json", database=database_path).json
    lift = found["figures"]["lift"]
    assert rows["figures: lift"] == f"value {lift['value']:.4g}, low {lift['low']:.4g}, high {lift['high']:.4g}"
    promoted = profiles("rollout", "promote", database=database_path)
    assert (promoted.code, "ramp it first" in promoted.err) == (5, True)
    back = profiles("rollout", "rollback", "--json", database=database_path)
    assert (back.code, back.json["stage"]) == (0, "rolled back")
    assert rows_shown(profiles("rollout", "status", database=database_path).out)["stage"] == "rolled back"
    assert [entry[:2] for entry in asyncio.run(outcomes(database_path))] == [
        *[("the command line", "ramp roll-out")] * 2,
        ("the command line", "promote challenger"),
        ("the command line", "roll back roll-out"),
    ]


@pytest.mark.parametrize("reason", ["x" * 401, "a\nb"])
def test_reason_is_bounded_text(profiles: Run, database_path: Path, reason: str) -> None:
    refused = profiles("rollout", "rollback", "--reason", reason, database=database_path)
    assert refused.code == 5
    assert "--reason" in refused.err
    assert asyncio.run(outcomes(database_path)) == []
