"""The cost of an event, and of periodic work per user, with 100,000 and with 1,000,000 users, in CPU time.

`python -m tests.bench.scale` measures SQLite, with `--postgres` PostgreSQL. It takes several minutes and 10 GB of disk.
CPU time is that of this process and of the database server: other programs change it less than the time that passes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import uvloop

from app.bandit.model.inputs import SPEC_V2
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bootstrap.service import open_service
from app.features.clock import DAY_MS, SystemClock
from app.profiles.rebuild import RebuildRun, scope_of
from app.settings import Settings
from app.settings.parsers import PostgresUrl, postgres_url
from app.stores.migrate import migrate
from app.stores.sql.database import Connection, Database
from app.stores.valkey.embedded import EmbeddedServer, cache_options
from app.telemetry import configure_logging
from tests.support.bandit_process import BanditProcess
from tests.support.clock import FakeClock
from tests.support.events import admitted, feedback
from tests.support.postgres import PostgresServer, account
from tests.support.registry import FEATURES

SIZES = (100_000, 1_000_000)
EVENTS = 4  # of each user
AT_ONCE = 20_000
ROUNDS = 3
FOR_S = 0.3
SETTINGS: dict[str, Any] = {"shared_buffers": "2GB", "max_wal_size": "4GB", "synchronous_commit": "on", "fsync": "on"}
_NUMBERS = {
    "sqlite": "WITH RECURSIVE made (n) AS (SELECT :low UNION ALL SELECT n + 1 FROM made WHERE n + 1 < :high)",
    "postgres": "WITH made (n) AS (SELECT generate_series(CAST(:low AS BIGINT), CAST(:high AS BIGINT) - 1))",
}
_USER = f"'user-' || substr(CAST(10000000 + n / {EVENTS} AS TEXT), 2)"
_FILLS = (
    f"""INSERT INTO event_log (seq, event_id, subject, user_id, digest, occurred_at_ms, received_at_ms)
    {{numbers}} SELECT n + 1, 'stored-' || n, 'signals.tip.feedback', {_USER}, :digest,
        :now - n % :span, :now FROM made""",
    f"""INSERT INTO tip_feedback
        (seq, user_id, tip_id, occurred_at_ms, utc_offset_min, received_at_ms, action, dwell_ms)
    {{numbers}} SELECT n + 1, {_USER}, 'tip', :now - n % :span, 0, :now, 'completed', n % 1000
    FROM made""",
    f"""INSERT INTO bandit_states (user_id, spec_hash, evidence, decisions, updated_at_ms)
    {{numbers}} SELECT {_USER}, :spec, :evidence, 3, :now FROM made WHERE n % {EVENTS} = 0""",
)
_LOCKS = f"INSERT INTO users {{numbers}} SELECT {_USER} FROM made WHERE n % {EVENTS} = 0"


async def fill(database: Database, engine: str, users: int, now_ms: int) -> None:
    """Store users, each with `EVENTS` events and with statistics."""
    random = np.random.default_rng(1)
    one = SufficientStatistics.none(SPEC_V2)
    for _ in range(3):
        one = one.learned(random.uniform(-0.2, 0.2, SPEC_V2.size), 1.0)
    values = {"now": now_ms, "span": 28 * DAY_MS, "digest": bytes(16), "spec": SPEC_V2.hash, "evidence": one.pack()}
    statements = [*_FILLS, *([_LOCKS] if engine == "postgres" else [])]
    for low in range(0, users * EVENTS, AT_ONCE * EVENTS):
        bounds = {"low": low, "high": min(low + AT_ONCE * EVENTS, users * EVENTS), **values}

        def work(connection: Connection, bounds: dict[str, Any] = bounds) -> None:
            for statement in statements:
                connection.execute(statement.format(numbers=_NUMBERS[engine]), bounds)

        await database.write(work, of=())
    if engine == "postgres":
        await database.execute("SELECT setval('event_seq', CAST(? AS BIGINT))", (users * EVENTS + 1,))


def cpu_s(session: int | None) -> float:
    """The CPU seconds of this process, and of the processes of a session."""
    found = time.process_time()
    for stat in Path("/proc").glob("[0-9]*/stat") if session is not None else ():
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


async def least(session: int | None, work: Callable[[], Awaitable[float]]) -> float:
    """The least CPU seconds per unit of some rounds. `work` returns the units that it did."""
    costs = []
    for _ in range(ROUNDS):
        begun = cpu_s(session)
        if units := await work():
            costs.append((cpu_s(session) - begun) / units)
    return min(costs)


async def costs(  # noqa: C901  # a list of what is measured
    settings: Settings, session: int | None, users: int
) -> dict[str, float]:
    """Microseconds of each kind of work, per unit."""
    now_ms = SystemClock().now_ms()
    async with open_service(settings, door="command") as service:
        engine = "sqlite" if session is None else "postgres"
        await fill(service.database, engine, users, now_ms)
        if engine == "postgres":
            await service.database.read(lambda connection: connection.execute("ANALYZE"))
        clock = FakeClock()
        clock.step_to(now_ms)
        process = BanditProcess(service.database, clock=clock)
        random, number = Random(1), iter(range(1_000_000))

        def any_user() -> str:
            return f"user-{random.randrange(users):07}"

        async def ingest() -> float:
            for _ in range(50):
                events = [feedback(any_user(), now_ms, event_id=f"new-{next(number)}") for _ in range(100)]
                (appended,) = await process.log.append([[admitted(event, now_ms) for event in events]])
                await process.consumer.consume(appended.seqs)  # type: ignore[union-attr]
            return 50 * 100

        async def learn() -> float:
            for _ in range(50):
                await process.learn_one(any_user())
            return 50

        maintenance = process.bandit.maintenance
        round_ms = now_ms

        async def summed() -> float:
            before = await process.rows("SELECT COALESCE(SUM(users), 0) FROM pooled_ranges")
            await maintenance.sum_ranges(now_ms, FOR_S)
            after = await process.rows("SELECT COALESCE(SUM(users), 0) FROM pooled_ranges")
            return float(after[0][0] - before[0][0])

        async def checked() -> float:
            nonlocal round_ms
            round_ms += 1
            clock.step_to(round_ms)
            await maintenance.sum_ranges(round_ms, FOR_S)
            ((found,),) = await process.rows("SELECT SUM(users) FROM pooled_ranges WHERE claimed_at_ms = ?", round_ms)
            return float(found)

        async def pooled() -> float:
            ((ranges,),) = await process.rows("SELECT COUNT(*) FROM pooled_ranges")
            await process.execute("UPDATE pooled_ranges SET revision = revision + 1 WHERE first_user = ''")
            assert await process.bandit.states.pool(now_ms)
            return float(ranges)

        run: dict[str, Any] = {"id": "run", "scope": scope_of(None), "user_ids": None}
        run |= {"features": [*service.registry.names], "state": "queued", "position": "", "requested_by": "bench"}
        run |= {"created_at_ms": now_ms, "touched_at_ms": now_ms, "started_at_ms": None, "finished_at_ms": None}
        await service.rebuild_runs.open(RebuildRun(**run, done=0, total=users, error=None))

        async def rebuilt() -> float:
            before = await service.rebuild_runs.get("run")
            await service.rebuild_runner.run("run", FOR_S)
            after = await service.rebuild_runs.get("run")
            assert before is not None
            assert after is not None
            return after.done - before.done

        async def counted() -> float:
            return await service.users.count_eligible(now_ms - 30 * DAY_MS)

        found = {
            "event: ingest and consume, 100 at once": await least(session, ingest),
            "event: decide, ingest and learn": await least(session, learn),
            "user: sum for the pooled prior": await least(session, summed),
        }
        await maintenance.sum_ranges(now_ms, math.inf)
        found |= {
            "range: prior from the sums": await least(session, pooled),
            "user: find that no sum has changed": await least(session, checked),
            "user: rebuild": await least(session, rebuilt),
            "user: count before a rebuild": await least(session, counted),
        }
        return {name: 1e6 * cost for name, cost in found.items()}


def measure(engine: str, users: int) -> tuple[dict[str, float], float]:
    """The costs, and the size of the database in bytes per user."""
    with tempfile.TemporaryDirectory(prefix="scale-") as name, ExitStack() as stack:
        root = Path(name)
        database: Path | PostgresUrl = root / "profiles.db"
        server = None
        if engine == "postgres":
            root.chmod(0o755)
            home = root / "postgres"
            home.mkdir()
            if (owner := account()) is not None:
                shutil.chown(home, owner)
            server = PostgresServer(home, **SETTINGS)
            stack.callback(server.close)
            server.create()
            server.start()
            database = postgres_url(server.url())
        migrate(database)
        cache = EmbeddedServer(root / "cache", root / "c.sock", cache_options(1_024))
        stack.callback(cache.stop)
        cache.start()
        settings = Settings(features=FEATURES, database=database, cache_url=cache.url)
        found = uvloop.run(costs(settings, server.pid if server is not None else None, users))
        if server is not None:
            ((size,),) = server.execute("SELECT pg_database_size('postgres')")
        else:
            size = settings.require_file().stat().st_size
        return found, size / users


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--users", type=int, nargs=2, default=SIZES)
    arguments = parser.parse_args()
    configure_logging("console", "warning")
    (few, small), (many, large) = [
        measure("postgres" if arguments.postgres else "sqlite", users) for users in arguments.users
    ]
    print(f"{'µs of CPU time':<46}{arguments.users[0]:>12,}{arguments.users[1]:>12,}   ratio")
    for name, cost in few.items():
        print(f"{name:<46}{cost:>12,.1f}{many[name]:>12,.1f}{many[name] / cost:>8.2f}")
    print(f"{'database, bytes per user':<46}{small:>12,.0f}{large:>12,.0f}{large / small:>8.2f}")


if __name__ == "__main__":
    main()
