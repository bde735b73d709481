"""The service and the references as processes of their own, which end with their block."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import redis

from app.settings import Settings, hash_key
from tests.bench.load import get, post, wrk
from tests.bench.reference_servers import key
from tests.support.processes import free_port
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually_sync

KEY = "a-key-for-the-benchmark"
STOP_S = 20


@contextmanager
def running(command: list[str], environment: Mapping[str, str]) -> Iterator[int]:
    """A process with `environment` added to ours; yields its id. It gets SIGTERM, and SIGKILL if it does not end."""
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()


@contextmanager
def serving(
    command: list[str], environment: Mapping[str, str], port: int, path: str, timeout_s: float = 20
) -> Iterator[int]:
    """A process that answers `path` on a port; yields its id."""
    with running(command, environment) as pid:
        eventually_sync(lambda: _answers(f"http://127.0.0.1:{port}{path}"), timeout_s)
        yield pid


@contextmanager
def service(settings: Settings) -> Iterator[int]:
    """`profiles serve` with a key; yields its port."""
    with service_and_pid(settings) as (port, _):
        yield port


@contextmanager
def service_and_pid(settings: Settings) -> Iterator[tuple[int, int]]:
    port = free_port()
    command = [sys.executable, "-m", "app", "serve"]
    with serving(command, service_environment(settings, port), port, "/healthz") as pid:
        yield port, pid


def process_environment(settings: Settings) -> dict[str, str]:
    """The settings as the environment of a process."""
    return {
        "PROFILES_DATABASE": getattr(settings.database, "url", None) or str(settings.database),
        "PROFILES_FEATURES": settings.features or "",
        "PROFILES_CACHE_URL": settings.cache_url or "",
        "PROFILES_QUEUE_URL": settings.queue_url or "",
        "PROFILES_NEAR_USERS": str(settings.near_users),
        "PROFILES_SHADOW": str(int(settings.shadow)),
        "PROFILES_LOG_LEVEL": "error",
    }


def service_environment(settings: Settings, port: int) -> dict[str, str]:
    """The environment of `profiles serve`, with the port and `KEY`."""
    return {
        **process_environment(settings),
        "PROFILES_PORT": str(port),
        "PROFILES_API_KEYS": f"bench:admin:{hash_key(KEY).hex()}",
    }


def without_local_cache(settings: Settings) -> Settings:
    """Every hit comes from the cache server, as for users who are read less often than others."""
    return replace(settings, near_users=0)


@contextmanager
def constant() -> Iterator[int]:
    """A bare ASGI application with a constant answer; yields its port."""
    port = free_port()
    with serving([sys.executable, "-m", "tests.bench.minimal_server", "asgi", str(port)], {}, port, "/"):
        yield port


@contextmanager
def plain_route(url: str, users: Sequence[str]) -> Iterator[int]:
    """Litestar with one redis-py MGET a request, with values for the users; yields its port."""
    with redis.Redis.from_url(url) as client:
        client.mset({key(user, name): "0.5" for user in users for name in REGISTRY.names})
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.reference_servers", "mget", str(port), url]
    with serving(command, {}, port, f"/profiles/{users[0]}"):
        yield port


def singles(users: Sequence[str]) -> list[bytes]:
    """A read of each user."""
    return [get(f"/profiles/{user}", KEY) for user in users]


def batches(users: Sequence[str], size: int, step: int | None = None) -> list[bytes]:
    """Batch reads of `size` users; each begins `step` users after the previous one."""
    groups = [users[start : start + size] for start in range(0, len(users) - size + 1, step or size)]
    return [post("/profiles/batch", json.dumps({"user_ids": group}).encode(), KEY) for group in groups]


def warm_up(port: int, users: Sequence[str]) -> None:
    """Bring every profile into the cache."""
    for request in batches(users, min(len(users), 1_000)):
        wrk(port, [request], 1, 1)


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
        return bool(answer.status == 200)
    return False
