"""Warm profiles over HTTP: against a bare ASGI constant and against a plain route, on the same server, by wrk."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median

import redis

from app.features.definitions import REGISTRY
from app.settings import Settings, hash_key
from tests.bench.load import Load, get, post, wrk
from tests.bench.processes import running, told_of
from tests.bench.references import key
from tests.bench.timing import Comparison
from tests.support.waiting import eventually_sync

ROUNDS = 5
KEY = "a-key-for-the-benchmark"
BATCH = 100


def measure(settings: Settings, users: list[str]) -> Iterator[Comparison]:
    """Single reads at 1 and 32 connections, batches of 100 at 8; keys, metrics and request ids on."""
    if shutil.which("wrk") is None:
        print("wrk is missing (Debian: apt-get install wrk): no figures over HTTP", file=sys.stderr)
        return
    _fill_reference(settings, users)
    bare, plain, ours = free_port(), free_port(), free_port()
    references = [sys.executable, "-m", "tests.bench.references"]
    with (
        child([*references, "constant", str(bare)], {}, bare, "/"),
        child([*references, "mget", str(plain), settings.cache_url or ""], {}, plain, f"/profiles/{users[0]}"),
        service(settings, ours),
    ):
        single = [get(f"/profiles/{user}", KEY) for user in users]
        many = [
            post("/profiles/batch", json.dumps({"user_ids": users[start : start + BATCH]}).encode(), KEY)
            for start in range(0, len(users) - BATCH, BATCH // 2)
        ]
        wrk(ours, many, 1, 1)  # warm
        name, constant, naive = "warm read, 32 connections", "bare ASGI constant", "Litestar + MGET"
        yield compare_loads(name, constant, (bare, single), (ours, single), 32, 2.5)
        yield compare_loads(name, naive, (plain, single), (ours, single), 32, 1 / 3.5)
        yield compare_loads("warm read, 1 connection, p50", constant, (bare, single), (ours, single), 1, 3, _p50)
        yield compare_loads(f"batch of {BATCH}, 8 connections", naive, (plain, many), (ours, many), 8, 1 / 1.5)


@contextmanager
def service(settings: Settings, port: int) -> Iterator[None]:
    """`profiles serve` as a process of its own, with a key."""
    environment = {
        **told_of(settings),
        "PROFILES_PORT": str(port),
        "PROFILES_API_KEYS": f"bench:admin:{hash_key(KEY).hex()}",
    }
    with child([sys.executable, "-m", "app", "serve"], environment, port, "/healthz"):
        yield


@contextmanager
def child(
    command: list[str], environment: dict[str, str], port: int, path: str, timeout_s: float = 20
) -> Iterator[None]:
    """A serving process, from when it answers until the block ends."""
    with running(command, environment):
        eventually_sync(lambda: _answers(f"http://127.0.0.1:{port}{path}"), timeout_s)
        yield


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def seconds(load: Load) -> float:
    """Seconds per request, all connections together."""
    return 1 / load.rate


def compare_loads(
    name: str,
    reference_name: str,
    reference: tuple[int, list[bytes]],
    ours: tuple[int, list[bytes]],
    connections: int,
    at_most: float | None,
    figure: Callable[[Load], float] = seconds,
) -> Comparison:
    """Load both in turn; each is a port and its requests, which may ask the same in different words."""
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for (port, requests), taken in zip((reference, ours), figures, strict=True):
            taken.append(figure(wrk(port, requests, connections)))
    return Comparison(name, reference_name, median(figures[0]), median(figures[1]), at_most)


def _p50(load: Load) -> float:
    return load.p50


def _fill_reference(settings: Settings, users: list[str]) -> None:
    with redis.Redis.from_url(settings.cache_url or "") as client:
        client.mset({key(user, name): "0.5" for user in users for name in REGISTRY.names})


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
        return bool(answer.status == 200)
    return False
