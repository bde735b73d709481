"""Once, twice and ten times what the service can take: what is answered well, what is sent away, and how long it takes.

Load comes from many connections that pause between requests, so that the rate does not fall as answers get slower, as
far as they do not all wait for one: what came in fact is shown beside what was meant to. Of what is let in, of hits and
of /healthz, probes measure the latency at the side, through connections of their own. The load shares the machine with
the service; it has the lowest priority, so that it takes what the service leaves. Measured is what comes once the
connections stand: to open thousands takes seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from threading import Event, Thread
from time import monotonic

import redis

from tests.bench.ground import Ground, add_users
from tests.bench.load import PREPARED, get, post, wrk
from tests.bench.serving import KEY, service_and_pid, singles, warm
from tests.bench.soak import resident_mib
from tests.bench.timing import Comparison, Curve, Result
from tests.support.http import Broken, Connection

TIMES = (1, 2, 10)
CONNECTIONS = 3_000
OPENING_S, SECONDS, MORE_S = 4, 6, 2
COLD_USERS, COLD_EVENTS = 20_000, 20
EVENTS_AT_ONCE, REQUESTS = 20, 12_000
AFTER_ALL = ("nice", "-n", "19")
PROBE_EVERY_S = 0.02
FLUSH_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind, made anew for each run, and what a good answer to them is."""

    name: str
    make: Callable[[], list[bytes]]
    method: str
    route: str
    status: str


@dataclass(slots=True)
class Seen:
    """Of one run: answers per second by status, latencies of the probes, and the process's memory at its highest."""

    good: float = 0.0
    shed: float = 0.0
    other: float = 0.0
    admitted_s: list[float] = field(default_factory=list)
    hits_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    probes: Counter[str] = field(default_factory=Counter)
    mib: float = 0.0


def measure(ground: Ground) -> Iterator[Result]:
    """Cold reads, then events."""
    cold = add_users(ground.settings.database, "overload", COLD_USERS, COLD_EVENTS, ground.now_ms)
    numbers = itertools.count(1)
    kinds = (
        Kind("cold reads", lambda: singles(cold), "GET", "/profiles/{user_id}", "200"),
        Kind("events", lambda: _events(numbers), "POST", "/events", "202"),
    )
    with service_and_pid(ground.settings) as (port, pid):
        for kind in kinds:
            warm(port, ground.users[:100])
            capacities: list[float] = []
            seen: list[Seen] = []
            for times in TIMES:
                # Measured anew: the more events are stored, the longer the next ones take.
                capacities.append(_capacity(ground, port, kind))
                seen.append(asyncio.run(_run(ground, port, pid, kind, times * capacities[-1])))
            for times, one in zip(TIMES, seen, strict=True):
                hits, refused = one.probes["hit answered"], one.probes["hit refused"]
                # A few are computed, and may be refused: where the circuit to the cache was open for a moment.
                if one.other or refused > hits / 5 or one.probes["health refused"]:
                    raise AssertionError(f"{kind.name} × {times}: {one.other} other answers, {one.probes}")
            name = f"overload, {kind.name}: time for each answered well at 10 times the capacity"
            yield Comparison(name, "at the capacity", 1 / capacities[-1], 1 / seen[-1].good, 1.33)
            yield from _curves(kind.name, capacities, seen)


def _capacity(ground: Ground, port: int, kind: Kind) -> float:
    """Good answers a second to clients that are as many as it takes, and no more."""
    with _flushing(ground):
        return max(wrk(port, kind.make(), connections, 3).rate for connections in (16, 48))


def _curves(name: str, capacities: Sequence[float], seen: Sequence[Seen]) -> Iterator[Result]:
    rates = {
        "answered well": [one.good for one in seen],
        "sent away": [one.shed for one in seen],
        "came": [one.good + one.shed for one in seen],
        "capacity": list(capacities),
    }
    yield Curve(f"overload, {name}: answers", "times the capacity", "per second", TIMES, rates)
    latencies = {
        "p99, let in": [_p99(one.admitted_s) for one in seen],
        "p99, hits": [_p99(one.hits_s) for one in seen],
        "p99, /healthz": [_p99(one.health_s) for one in seen],
    }
    yield Curve(f"overload, {name}: latency", "times the capacity", "seconds", TIMES, latencies)
    yield Curve(f"overload, {name}: memory", "times the capacity", "MiB", TIMES, {"API": [one.mib for one in seen]})


async def _run(ground: Ground, port: int, pid: int, kind: Kind, rate: float) -> Seen:
    seen = Seen()
    requests = kind.make()
    over = asyncio.Event()
    with _flushing(ground):
        load = asyncio.create_task(_load(port, requests, rate))
        await asyncio.sleep(OPENING_S)
        before, began = await _answers(port, kind), monotonic()
        probes = [
            asyncio.create_task(_probe(port, pid, request, label, times, seen, over))
            for label, request, times in (
                ("admitted", requests[-1], seen.admitted_s),
                ("hit", get(f"/profiles/{ground.users[0]}", KEY), seen.hits_s),
                ("health", get("/healthz"), seen.health_s),
            )
        ]
        await asyncio.sleep(SECONDS)
        over.set()  # first: to answer how many there have been takes some time of the service
        after, took = await _answers(port, kind), monotonic() - began
        await asyncio.gather(load, *probes)
    by_status = {status: (after[status] - before[status]) / took for status in after}
    seen.good = by_status.pop(kind.status, 0.0)
    seen.shed = by_status.pop("503", 0.0)
    seen.other = sum(by_status.values())
    return seen


async def _load(port: int, requests: Sequence[bytes], rate: float) -> None:
    """wrk, with a pause on each connection."""
    with tempfile.TemporaryDirectory(prefix="wrk-") as name:
        sizes, bodies, script = (Path(name) / part for part in ("sizes", "bodies", "script.lua"))
        sizes.write_text("".join(f"{len(request)}\n" for request in requests))
        bodies.write_bytes(b"".join(requests))
        pause_ms = max(1, round(1000 * CONNECTIONS / rate))
        delay = f"delay = function() return math.random(0, {2 * pause_ms}) end\n"
        script.write_text(PREPARED % (bodies, sizes) + delay)
        lasts = f"-d{OPENING_S + SECONDS + MORE_S}s"
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", lasts, "-s", str(script), f"http://127.0.0.1:{port}"]
        process = await asyncio.create_subprocess_exec(*AFTER_ALL, *command, stdout=subprocess.DEVNULL)
        await process.wait()


async def _probe(
    port: int, pid: int, request: bytes, label: str, times: list[float], seen: Seen, over: asyncio.Event
) -> None:
    connection = Connection(port)
    while not over.is_set():
        try:
            answer = await connection.send(request)
        except Broken:
            seen.probes[f"{label} broken"] += 1
            continue
        good = answer.status < 300
        seen.probes[f"{label} {'answered' if good else 'refused'}"] += 1
        if good:
            times.append(answer.seconds)
        seen.mib = max(seen.mib, resident_mib(pid))
        await asyncio.sleep(PROBE_EVERY_S)
    await connection.close()


async def _answers(port: int, kind: Kind) -> Counter[str]:
    """How many of each status there have been."""
    connection = Connection(port)
    text = (await connection.get("/metrics")).body.decode()
    await connection.close()
    labels = rf'method="{kind.method}",route="{re.escape(kind.route)}",status="(\d+)"'
    found = re.findall(rf"^profiles_http_request_duration_seconds_count\{{{labels}\}} (\S+)$", text, re.MULTILINE)
    return Counter({status: int(float(count)) for status, count in found})


@contextmanager
def _flushing(ground: Ground) -> Iterator[None]:
    """What cold reads leave in the cache is taken out, so that they stay cold; what is near stays."""
    over = Event()

    def flush() -> None:
        with redis.Redis.from_url(ground.settings.cache_url or "") as client:
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
    """Requests with events that nobody has sent."""
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


def _p99(times: Sequence[float]) -> float:
    return quantiles(times, n=100)[98] if len(times) > 1 else float("nan")
