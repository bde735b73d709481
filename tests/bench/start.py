"""From the start of `profiles serve` to its first 200, against the least that can be started on the same server.

All are started in turn, and stopped again. Bytecode is kept, as everywhere but on machines that forbid it.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from statistics import median
from time import perf_counter, sleep

from tests.bench.ground import Ground
from tests.bench.load import get
from tests.bench.processes import running
from tests.bench.serving import free_port, served_on
from tests.bench.timing import Comparison, Result

ROUNDS = 15
LOOK_S = 0.001
START_S = 20
OURS, LITESTAR, BARE = "profiles serve", "Litestar, one route", "bare ASGI constant"


def measure(ground: Ground) -> Iterator[Result]:
    """Medians of the time to the first answer of /healthz."""
    taken: dict[str, list[float]] = {LITESTAR: [], BARE: [], OURS: []}
    for number in range(ROUNDS + 1):
        for name, times in taken.items():
            seconds = _once(name, ground)
            if number > 0:  # the first may have had to compile
                times.append(seconds)
    ours = median(taken[OURS])
    yield Comparison("start to first /healthz", LITESTAR, median(taken[LITESTAR]), ours, 1.75)
    yield Comparison("start to first /healthz", BARE, median(taken[BARE]), ours)


def _once(name: str, ground: Ground) -> float:
    port = free_port()
    command, environment = _command(name, ground, port)
    began = perf_counter()
    with running(command, {"PYTHONDONTWRITEBYTECODE": "", **environment}):
        _await_answer(port, began + START_S)
        return perf_counter() - began


def _command(name: str, ground: Ground, port: int) -> tuple[list[str], Mapping[str, str]]:
    if name == OURS:
        return [sys.executable, "-m", "app", "serve"], served_on(ground.settings, port)
    kind = "litestar" if name == LITESTAR else "asgi"
    return [sys.executable, "-m", "tests.bench.hello", kind, str(port)], {}


def _await_answer(port: int, deadline: float) -> None:
    request = get("/healthz")
    while perf_counter() < deadline:
        with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=START_S) as line:
            line.sendall(request)
            if line.recv(12) == b"HTTP/1.1 200":
                return
        sleep(LOOK_S)
    raise AssertionError(f"nothing answers on port {port}")
