"""The service under load, and others beside it, each a process of its own."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import redis

from app.settings import Settings, hash_key
from tests.bench.load import Load, get, post, wrk
from tests.bench.processes import running, told_of
from tests.bench.references import key
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually_sync

KEY = "a-key-for-the-benchmark"


class Target(NamedTuple):
    """A port, and the requests to send to it in turn; two targets may ask the same in different words."""

    port: int
    requests: Sequence[bytes]


def singles(users: Sequence[str]) -> list[bytes]:
    """A read of each user."""
    return [get(f"/profiles/{user}", KEY) for user in users]


def batches(users: Sequence[str], size: int, step: int | None = None) -> list[bytes]:
    """Reads of so many users at once."""
    groups = [users[start : start + size] for start in range(0, len(users) - size + 1, step or size)]
    return [post("/profiles/batch", json.dumps({"user_ids": group}).encode(), KEY) for group in groups]


def alternately(
    targets: Sequence[Target], connections: int, *, rounds: int, seconds: int = 2
) -> tuple[list[Load], ...]:
    """The loads of each, sent in turn."""
    loads: tuple[list[Load], ...] = tuple([] for _ in targets)
    for _ in range(rounds):
        for target, taken in zip(targets, loads, strict=True):
            taken.append(wrk(target.port, target.requests, connections, seconds))
    return loads


def middle(loads: Sequence[Load], figure: Callable[[Load], float]) -> float:
    """The median of a figure of several loads."""
    return median(figure(load) for load in loads)


def p50(load: Load) -> float:
    """Seconds."""
    return load.p50


def p99(load: Load) -> float:
    """Seconds."""
    return load.p99


def seconds(load: Load) -> float:
    """Seconds per request, all connections together."""
    return 1 / load.rate


@contextmanager
def service(settings: Settings) -> Iterator[int]:
    """`profiles serve` as a process of its own, with a key; its port."""
    with service_and_pid(settings) as (port, _):
        yield port


@contextmanager
def service_and_pid(settings: Settings) -> Iterator[tuple[int, int]]:
    """The same, and its process id."""
    port = free_port()
    with child([sys.executable, "-m", "app", "serve"], served_on(settings, port), port, "/healthz") as pid:
        yield port, pid


def served_on(settings: Settings, port: int) -> dict[str, str]:
    """What `profiles serve` must know beside the servers: its port, and our key."""
    return {
        **told_of(settings),
        "PROFILES_PORT": str(port),
        "PROFILES_API_KEYS": f"bench:admin:{hash_key(KEY).hex()}",
    }


def without_near(settings: Settings) -> Settings:
    """The same, with every hit from the cache's server: what a user gets who is read less often than others."""
    return replace(settings, near_users=0)


@contextmanager
def constant() -> Iterator[int]:
    """A bare ASGI application that answers always the same; its port."""
    port = free_port()
    with child([sys.executable, "-m", "tests.bench.references", "constant", str(port)], {}, port, "/"):
        yield port


@contextmanager
def plain_route(url: str, users: Sequence[str]) -> Iterator[int]:
    """Litestar with one redis-py MGET a request, with values for the users; its port."""
    with redis.Redis.from_url(url) as client:
        client.mset({key(user, name): "0.5" for user in users for name in REGISTRY.names})
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.references", "mget", str(port), url]
    with child(command, {}, port, f"/profiles/{users[0]}"):
        yield port


@contextmanager
def child(
    command: list[str], environment: dict[str, str], port: int, path: str, timeout_s: float = 20
) -> Iterator[int]:
    """A serving process, from when it answers until the block ends; its id."""
    with running(command, environment) as pid:
        eventually_sync(lambda: _answers(f"http://127.0.0.1:{port}{path}"), timeout_s)
        yield pid


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def warm(port: int, users: Sequence[str]) -> None:
    """Bring every profile into the cache."""
    for request in batches(users, min(len(users), 1_000)):
        wrk(port, [request], 1, 1)


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
        return bool(answer.status == 200)
    return False
