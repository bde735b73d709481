"""Overload: one, two and ten times the capacity of the service.

The load comes from many connections that pause between requests, so that its rate does not fall when answers get
slower, as long as some connections are free. The names of the results show the actual rates. Probes on connections of
their own measure the latency of admitted requests, of hits and of /healthz. The load shares the machine with the
service and runs at the lowest priority. The measurement begins when all connections are open, which takes seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import quantiles
from threading import Event, Thread
from time import monotonic

import redis

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import get, post, wrk, wrk_script
from tests.bench.servers import KEY, service_and_pid, singles, warm_up
from tests.support.bulk_users import add_users
from tests.support.http import Broken, Connection
from tests.support.processes import resident_mib

TIMES = (1, 2, 10)
CONNECTIONS = 3_000
OPENING_S, SECONDS, MORE_S = 4, 6, 2
COLD_USERS, COLD_EVENTS = 20_000, 20
EVENTS_AT_ONCE, REQUESTS = 20, 12_000
LOWEST_PRIORITY = ("nice", "-n", "19")
PROBE_EVERY_S = 0.02
FLUSH_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind, made anew for each run, and the status of an admitted one."""

    name: str
    make: Callable[[], list[bytes]]
    method: str
    route: str
    status: str


@dataclass(slots=True)
class Run:
    """The result of one run: answers per second, latencies of the probes, and the peak memory of the process."""

    capacity: float
    admitted: float = 0.0
    shed: float = 0.0
    other: float = 0.0
    admitted_s: list[float] = field(default_factory=list)
    hits_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    probes: Counter[str] = field(default_factory=Counter)
    mib: float = 0.0


def measure(environment: Environment) -> Iterator[Comparison]:
    """Cold reads, then events."""
    cold = add_users(environment.settings.require_file(), "overload", COLD_USERS, COLD_EVENTS, environment.now_ms)
    numbers = itertools.count(1)
    kinds = (
        Kind("cold reads", lambda: singles(cold), "GET", "/profiles/{user_id}", "200"),
        Kind("events", lambda: _events(numbers), "POST", "/events", "202"),
    )
    with service_and_pid(environment.settings) as (port, pid):
        for kind in kinds:
            warm_up(port, environment.users[:100])
            runs: dict[int, Run] = {}
            for times in TIMES:
                # The capacity is measured each time: the more events are stored, the longer the next ones take.
                capacity = _capacity(environment, port, kind)
                run = runs[times] = asyncio.run(_run(environment, port, pid, kind, times, capacity))
                # Some hits may be computed and shed, if the circuit breaker of the cache was open for a moment.
                hits, shed = run.probes["hit answered"], run.probes["hit shed"]
                if run.other or shed > hits / 5 or run.probes["health shed"]:
                    raise AssertionError(f"{kind.name} × {times}: {run.other} other answers, {run.probes}")
            for times, run in runs.items():
                yield from _compared(kind.name, times, run, runs[1])


def _capacity(environment: Environment, port: int, kind: Kind) -> float:
    """Answers per second to the number of clients that gives the most."""
    with _flushing(environment):
        return max(wrk(port, kind.make(), connections, 3).rate for connections in (16, 48))


def _compared(name: str, times: int, run: Run, normal: Run) -> Iterator[Comparison]:
    rates = f"{run.admitted + run.shed:,.0f}/s came, {run.shed:,.0f}/s were shed"
    name = f"overload, {name} × {times}"
    limit = 1.33 if times == max(TIMES) else None
    yield Comparison(f"{name}, per admitted request ({rates})", "capacity", 1 / run.capacity, 1 / run.admitted, limit)
    if times > 1:
        for what, before, after in (
            ("admitted", normal.admitted_s, run.admitted_s),
            ("hits", normal.hits_s, run.hits_s),
            ("/healthz", normal.health_s, run.health_s),
        ):
            if min(len(before), len(after)) > 1:
                yield Comparison(f"{name}, p99 of {what}", "× 1", _p99(before), _p99(after))
        yield Comparison(f"{name}, peak memory", "× 1", normal.mib * 2**20, run.mib * 2**20, unit="B")


async def _run(environment: Environment, port: int, pid: int, kind: Kind, times: int, capacity: float) -> Run:
    run = Run(capacity)
    requests = kind.make()
    over = asyncio.Event()
    with _flushing(environment):
        load = asyncio.create_task(_load(port, requests, times * capacity))
        await asyncio.sleep(OPENING_S)
        before, began = await _answers(port, kind), monotonic()
        probes = [
            asyncio.create_task(_probe(port, pid, request, label, latencies, run, over))
            for label, request, latencies in (
                ("admitted", requests[-1], run.admitted_s),
                ("hit", get(f"/profiles/{environment.users[0]}", KEY), run.hits_s),
                ("health", get("/healthz"), run.health_s),
            )
        ]
        await asyncio.sleep(SECONDS)
        over.set()  # before the service spends time on /metrics
        after, took = await _answers(port, kind), monotonic() - began
        await asyncio.gather(load, *probes)
    by_status = {status: (after[status] - before[status]) / took for status in after}
    run.admitted = by_status.pop(kind.status, 0.0)
    run.shed = by_status.pop("503", 0.0)
    run.other = sum(by_status.values())
    return run


async def _load(port: int, requests: Sequence[bytes], rate: float) -> None:
    """wrk, with a pause on each connection."""
    pause_ms = max(1, round(1000 * CONNECTIONS / rate))
    with wrk_script(requests, f"delay = function() return math.random(0, {2 * pause_ms}) end\n") as script:
        duration = f"-d{OPENING_S + SECONDS + MORE_S}s"
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", duration, "-s", script, f"http://127.0.0.1:{port}"]
        process = await asyncio.create_subprocess_exec(*LOWEST_PRIORITY, *command, stdout=subprocess.DEVNULL)
        await process.wait()


async def _probe(
    port: int, pid: int, request: bytes, label: str, latencies: list[float], run: Run, over: asyncio.Event
) -> None:
    connection = Connection(port)
    while not over.is_set():
        try:
            answer = await connection.send(request)
        except Broken:
            run.probes[f"{label} broken"] += 1
            continue
        good = answer.status < 300
        run.probes[f"{label} {'answered' if good else 'shed'}"] += 1
        if good:
            latencies.append(answer.seconds)
        run.mib = max(run.mib, resident_mib(pid))
        await asyncio.sleep(PROBE_EVERY_S)
    await connection.close()


async def _answers(port: int, kind: Kind) -> Counter[str]:
    """How many answers of each status there have been."""
    connection = Connection(port)
    text = (await connection.get("/metrics")).body.decode()
    await connection.close()
    labels = rf'method="{kind.method}",route="{re.escape(kind.route)}",status="(\d+)"'
    found = re.findall(rf"^profiles_http_request_duration_seconds_count\{{{labels}\}} (\S+)$", text, re.MULTILINE)
    return Counter({status: int(float(count)) for status, count in found})


@contextmanager
def _flushing(environment: Environment) -> Iterator[None]:
    """Flush the cache server repeatedly, so that cold reads stay cold. Local caches keep their profiles."""
    over = Event()

    def flush() -> None:
        with redis.Redis.from_url(environment.cache_url) as client:
            while not over.wait(FLUSH_EVERY_S):
                client.flushall()

    thread = Thread(target=flush)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _events(numbers: Iterator[int]) -> list[bytes]:
    """Requests with new events."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    event = (
        '{"subject":"signals.tip.served","event_id":"over-%d","user_id":"over-%d","tip_id":"tip","occurred_at":"'
        + now
        + '"}'
    )
    batches = (
        ",".join(event % (number, number % 5_000) for number in itertools.islice(numbers, EVENTS_AT_ONCE))
        for _ in range(REQUESTS)
    )
    return [post("/events", f"[{batch}]".encode(), KEY) for batch in batches]


def _p99(latencies: Sequence[float]) -> float:
    return quantiles(latencies, n=100)[98]
