"""`make bench`: a table with the reference, ours and the ratio; `--json FILE` keeps it for later comparison.

Everything runs in a temporary directory on servers of its own, which are gone at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from app.assembly import open_service
from app.commands.demo_set import generate
from app.settings import Settings
from app.stores.sqlite.migrate import migrate
from app.stores.system_clock import SystemClock
from app.stores.valkey.embedded import EmbeddedServer, cache_options, queue_options
from app.telemetry import configure_logging
from tests.bench import cold, http, ingest, queue_lag, rebuild, statements, while_rebuilding
from tests.bench.timing import Comparison

USERS = 1_000
DAYS = 60
CHUNK = 1_000
REBUILT = 1_000


async def load(settings: Settings, now_ms: int) -> None:
    """The demonstration set."""
    async with open_service(settings, door="bench") as service:
        events = [event for _, event in generate(users=USERS, days=DAYS, seed=1, now_ms=now_ms)]
        for start in range(0, len(events), CHUNK):
            await service.ingestor.ingest(events[start : start + CHUNK])


async def _measure(settings: Settings, now_ms: int) -> list[Comparison]:
    await load(settings, now_ms)
    results = [result async for result in statements.measure(settings.database, now_ms)]
    spare = settings.database.with_name("reference.db")
    shutil.copyfile(settings.database, spare)
    results += [result async for result in ingest.measure(spare, settings, now_ms)]
    results += [result async for result in rebuild.measure(settings, now_ms, REBUILT)]
    return results


async def _measure_queue(settings: Settings, bare_url: str, now_ms: int) -> list[Comparison]:
    return [result async for result in queue_lag.measure(settings, bare_url, now_ms)]


def main() -> None:
    """Measure, print, and keep where asked."""
    parser = argparse.ArgumentParser(prog="make bench", description="Ratios against references in the same run.")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    configure_logging("console", "error")
    now_ms = SystemClock().now_ms()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        migrate(directory / "profiles.db")
        cache = EmbeddedServer(directory / "cache", directory / "c.sock", cache_options(256))
        queue = EmbeddedServer(directory / "queue", directory / "q.sock", queue_options())
        bare = EmbeddedServer(directory / "bare", directory / "b.sock", queue_options())
        try:
            for server in (cache, queue, bare):
                server.start()
            settings = Settings(database=directory / "profiles.db", cache_url=cache.url, queue_url=queue.url)
            results = uvloop.run(_measure(settings, now_ms))
            results += uvloop.run(_measure_queue(settings, bare.url, now_ms))
            results += cold.measure(settings, now_ms)
            users = [f"user-{number:04d}" for number in range(1, USERS + 1)]
            results += http.measure(settings, users)
            results += while_rebuilding.measure(settings, users)
        finally:
            for server in (cache, queue, bare):
                server.stop()
    show(results)
    if arguments.json is not None:
        figures = [{**result._asdict(), "ratio": result.ratio} for result in results]
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def show(results: list[Comparison]) -> None:
    """Print a table."""
    table = Table("what", "against", title="seconds per unit of work, medians; a ratio below 1: ours is faster")
    for heading in ("reference", "ours", "ratio", "at most"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            result.reference,
            f"{result.reference_s * 1e6:,.1f} µs",
            f"{result.ours_s * 1e6:,.1f} µs",
            f"{result.ratio:.2f}",
            "" if result.at_most is None else f"{result.at_most:.2f} {'✓' if result.ratio <= result.at_most else '✗'}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
