"""A warm profile over HTTP, against a bare ASGI constant on the same server, both loaded by wrk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median

from app.settings import Settings
from tests.bench.timing import Comparison
from tests.support.waiting import eventually_sync

ROUNDS = 3
SECONDS = 3

_CONSTANT = """
import asyncio, signal, sys
import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

BODY = b'{"user_id":"user-0001","features":{}}'
HEAD = {"type": "http.response.start", "status": 200, "headers": [
    (b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]}

async def constant(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send(HEAD)
    await send({"type": "http.response.body", "body": BODY, "more_body": False})

async def main():
    server = Server(constant, port=int(sys.argv[1]), interface=Interfaces.ASGI, http=HTTPModes.http1,
                    websockets=False, log_enabled=False)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    await server.serve()

uvloop.run(main())
"""


def measure(settings: Settings, user_id: str) -> Iterator[Comparison]:
    """Seconds per request at 1 and 32 connections."""
    if shutil.which("wrk") is None:
        print("wrk is missing (Debian: apt-get install wrk): no figures over HTTP", file=sys.stderr)
        return
    ports = (_free_port(), _free_port())
    environment = {
        **os.environ,
        "PROFILES_DATABASE": str(settings.database),
        "PROFILES_CACHE_URL": settings.cache_url or "",
        "PROFILES_QUEUE_URL": settings.queue_url or "",
        "PROFILES_PORT": str(ports[1]),
        "PROFILES_LOG_LEVEL": "error",
    }
    urls = [f"http://127.0.0.1:{ports[0]}/", f"http://127.0.0.1:{ports[1]}/profiles/{user_id}"]
    with (
        _child([sys.executable, "-c", _CONSTANT, str(ports[0])], environment, urls[0]),
        _child([sys.executable, "-m", "app", "serve"], environment, urls[1]),
    ):
        for connections in (1, 32):
            rates: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for url, taken in zip(urls, rates, strict=True):
                    taken.append(_requests_per_s(url, connections))
            name = f"warm read, {connections} connection{'s' if connections > 1 else ''}"
            yield Comparison(name, "bare ASGI constant", 1 / median(rates[0]), 1 / median(rates[1]))


def _requests_per_s(url: str, connections: int) -> float:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", url]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    if "Non-2xx" in text:
        raise AssertionError(f"{url} answered with errors: {text}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found is not None
    return float(found[1])


@contextmanager
def _child(command: list[str], environment: dict[str, str], url: str) -> Iterator[None]:
    child = subprocess.Popen(command, env=environment)
    try:
        eventually_sync(lambda: _answers(url), timeout_s=20)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(15)
        child.kill()
        child.wait()


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
        return bool(answer.status == 200)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
