"""`make soak`: does memory stay where it is, while the service answers a little of everything for ten minutes?

Resident memory of API, worker and cache over the minutes, as a plot and as JSON, and the slope after a warm-up third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression, median
from time import monotonic
from typing import NamedTuple

import redis
import uvloop
from rich.console import Console
from rich.table import Table

from app.settings import Settings
from app.stores.system_clock import SystemClock
from app.telemetry import configure_logging
from tests.bench.ground import Ground, ground, prepared
from tests.bench.mixture import Clients, Mixture
from tests.bench.plots import draw
from tests.bench.processes import told_of
from tests.bench.report import written
from tests.bench.serving import child, free_port, served_on
from tests.bench.timing import Curve

OUTPUT = Path("var/bench")
PROC = Path("/proc")
MINUTES, LEAST_MINUTES, RATE = 10.0, 0.2, 300.0
SAMPLE_S = 2.0
POINTS = 60
# So low that the ever-new users fill it early: from then on it evicts, as in production.
CACHE_LIMIT = "8mb"


class Soak(NamedTuple):
    """What was seen: minutes since the beginning, MiB of each process at each of them, and the clients' counts."""

    minutes: list[float]
    resident: dict[str, list[float]]
    clients: Clients

    @property
    def warm_from(self) -> int:
        """The place of the first sample after the warm-up third."""
        return next(place for place, at in enumerate(self.minutes) if at >= self.minutes[-1] / 3)

    def slope(self, name: str) -> float:
        """MiB per hour after the warm-up, by least squares."""
        place = self.warm_from
        return 60 * linear_regression(self.minutes[place:], self.resident[name][place:]).slope


def main() -> None:
    """Soak, print and keep; exit code 1 where something was answered otherwise than asked for."""
    parser = argparse.ArgumentParser(prog="make soak", description="Resident memory under a steady mixture.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"how long ({MINUTES:g})")
    parser.add_argument("--rate", type=float, default=RATE, help=f"requests per second ({RATE:g})")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"where the JSON and the plot go ({OUTPUT})")
    arguments = parser.parse_args()
    if arguments.minutes < LEAST_MINUTES:
        parser.error(f"in less than {LEAST_MINUTES:g} minutes no slope can be told")
    if not (PROC / "self" / "status").exists():
        sys.exit("Resident memory is read from /proc, which this system does not have: the soak needs Linux.")
    configure_logging("console", "error")
    with prepared() as template, ground(template) as place, _service(place.settings) as (port, pids):
        soak = uvloop.run(_soak(place, port, pids, 60 * arguments.minutes, arguments.rate))
    _show(soak)
    curve = Curve("resident memory under a steady mixture", "minutes", "MiB", *_thinned(soak))
    (plot,) = draw([curve], arguments.output)
    figures = arguments.output / "soak.json"
    found = json.loads(written([curve]))
    found["mib_per_hour"] = {name: soak.slope(name) for name in soak.resident}
    found["answers"] = {": ".join(key): count for key, count in sorted(soak.clients.answers.items())}
    figures.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{figures} and {plot}")
    if odd := soak.clients.unexpected():
        sys.exit("Answered otherwise than asked for: " + "; ".join(odd))


@contextmanager
def _service(settings: Settings) -> Iterator[tuple[int, dict[str, int]]]:
    """API and worker; the API's port, and the ids of all processes by name."""
    port, metrics_port = free_port(), free_port()
    worker = {**told_of(settings), "PROFILES_WORKER_METRICS_PORT": str(metrics_port)}
    with redis.Redis.from_url(settings.cache_url or "") as cache:
        cache.config_set("maxmemory", CACHE_LIMIT)
        server = cache.info("server")
        assert isinstance(server, dict)
    with (
        child([sys.executable, "-m", "app", "serve"], served_on(settings, port), port, "/healthz") as api,
        child([sys.executable, "-m", "app", "worker"], worker, metrics_port, "/metrics") as working,
    ):
        yield port, {"API": api, "worker": working, "cache": int(server["process_id"])}


async def _soak(place: Ground, port: int, pids: Mapping[str, int], seconds: float, rate: float) -> Soak:
    clients = Clients(port, place.settings.queue_url or "", Mixture(place.users, SystemClock()))
    soak = Soak([], {name: [] for name in pids}, clients)
    stop = asyncio.Event()
    sending = asyncio.create_task(clients.send(rate, stop))
    begun = monotonic()
    while monotonic() - begun < seconds and not sending.done():
        soak.minutes.append((monotonic() - begun) / 60)
        for name, pid in pids.items():
            soak.resident[name].append(resident_mib(pid))
        await asyncio.wait({sending}, timeout=SAMPLE_S)
    stop.set()
    await sending
    return soak


def resident_mib(pid: int) -> float:
    """VmRSS of a process; raises `AssertionError` where it has ended."""
    status = (PROC / str(pid) / "status").read_text()
    _, found, rest = status.partition("VmRSS:")
    assert found, f"process {pid} has ended: {status}"
    return int(rest.split(maxsplit=1)[0]) / 1024


def _thinned(soak: Soak) -> tuple[list[float], dict[str, list[float]]]:
    """As many points as can be told apart in a plot, each the median of its samples."""
    step = max(1, len(soak.minutes) // POINTS)
    places = range(0, len(soak.minutes), step)
    resident = {name: [median(line[place : place + step]) for place in places] for name, line in soak.resident.items()}
    return [soak.minutes[place] for place in places], resident


def _show(soak: Soak) -> None:
    total, place = soak.clients.answers.total(), soak.warm_from
    table = Table(title=f"resident memory in MiB; {total:,} requests and jobs in {soak.minutes[-1]:.1f} minutes")
    for heading in ("process", "at start", "after the warm-up third", "at the end", "most", "MiB per hour since"):
        table.add_column(heading, justify="right")
    for name, line in soak.resident.items():
        figures = (line[0], line[place], line[-1], max(line))
        table.add_row(name, *(f"{figure:.1f}" for figure in figures), f"{soak.slope(name):+.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
