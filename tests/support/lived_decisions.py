"""Decisions that were made and learned by a process, with rewards that depend on the profile of the user."""

import itertools
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np

from app.bandit.model.inputs import Context
from app.features.clock import EPOCH, MILLISECOND
from app.stores.sql.database import Database
from app.stores.sqlite.database import SqliteDatabase
from tests.support.bandit_process import BanditProcess
from tests.support.clock import FakeClock
from tests.support.score_requests import tip

MINUTE_MS = 60_000
COPIED = """
WITH RECURSIVE copies(copy) AS (SELECT 1 UNION ALL SELECT copy + 1 FROM copies WHERE copy < {copies})
INSERT INTO {table} ({columns}) SELECT {values} FROM {table}, copies
"""


async def live_through(
    database: Database, decisions: int, *, users: int = 20, seed: int = 1, clock: FakeClock | None = None
) -> BanditProcess:
    """Let users decide and give feedback, a minute apart, and pool a prior now and then. A user with a high completion
    rate completes old tips after 60 seconds, the others new ones after one."""
    random = np.random.default_rng(seed)
    process = BanditProcess(database, clock=clock, numbers=itertools.count(1))
    rates = random.random(users).tolist()
    process.profiles = {
        f"user-{place}": {"completion_rate_30d": rate, "tip_volume_30d": 40, "preferred_hour": place % 24}
        for place, rate in enumerate(rates)
    }
    process.versions = {user_id: {} for user_id in process.profiles}  # unknown: they were not computed from events
    for made in range(decisions):
        process.clock.advance(MINUTE_MS)
        place = int(random.integers(users))
        ages, priorities = random.uniform(0, 60, 4).tolist(), random.integers(0, 4, 4).tolist()
        tips = tuple(
            tip(f"tip-{made}-{number}", number % 2 == 0, age, float(priority))
            for number, (age, priority) in enumerate(zip(ages, priorities, strict=True))
        )
        at = Context((EPOCH + process.clock.now_ms() * MILLISECOND).astimezone(UTC))
        decision = await process.decide(f"user-{place}", candidates=tips, context=at)
        old = ages[decision.chosen] / 60
        liked = 0.2 + 0.6 * (old if rates[place] > 0.5 else 1 - old)
        await process.feed_back(
            decision,
            "completed" if random.random() < liked else "dismissed",
            dwell_ms=60_000 if rates[place] > 0.5 else 1_000,
        )
        if made % 50 == 49:
            await process.pool()
    return process


async def write_log(path: Path, decisions: int, *, copies: int = 0, **lived: Any) -> None:
    """`live_through` in a SQLite database, in which each decision is then copied so many times, to other users."""
    database = await SqliteDatabase.open(path, 1)
    process = await live_through(database, decisions, **lived)
    for table, changed in (("tip_scores", ("decision_id", "user_id")), ("bandit_states", ("user_id",))):
        (row,) = await process.rows(f"SELECT group_concat(name) FROM pragma_table_info('{table}')")
        columns = [name for name in str(row[0]).split(",") if name != "number"]
        values = ", ".join(f"{name} || '-' || copy" if name in changed else name for name in columns)
        if copies:
            statement = COPIED.format(copies=copies, table=table, columns=", ".join(columns), values=values)
            await process.execute(statement)
    await process.close()
    await database.close()
