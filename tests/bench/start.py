"""From the start of `profiles serve` to its first 200, against a one-route Litestar application on the same server.

Both start in alternating rounds, with cached bytecode.
"""

import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from statistics import median
from time import perf_counter, sleep

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import get
from tests.bench.servers import running, service_environment
from tests.support.processes import free_port

ROUNDS = 15
POLL_S = 0.001
START_S = 20
LITESTAR = "Litestar, one route"


def measure(environment: Environment) -> Iterator[Comparison]:
    """Medians of the time to the first answer of /healthz."""
    reference: list[float] = []
    ours: list[float] = []
    for _ in range(ROUNDS + 1):
        port = free_port()
        reference.append(_start([sys.executable, "-m", "tests.bench.minimal_server", "litestar", str(port)], {}, port))
        port = free_port()
        variables = service_environment(environment.settings, port)
        ours.append(_start([sys.executable, "-m", "app", "serve"], variables, port))
    # The first start may have compiled bytecode.
    yield Comparison("start to first /healthz", LITESTAR, median(reference[1:]), median(ours[1:]), 1.75)


def _start(command: list[str], environment: dict[str, str], port: int) -> float:
    began = perf_counter()
    with running(command, {"PYTHONDONTWRITEBYTECODE": "", **environment}):
        _await_answer(port, began + START_S)
        return perf_counter() - began


def _await_answer(port: int, deadline: float) -> None:
    request = get("/healthz")
    while perf_counter() < deadline:
        with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=START_S) as line:
            line.sendall(request)
            if line.recv(12) == b"HTTP/1.1 200":
                return
        sleep(POLL_S)
    raise AssertionError(f"no answer on port {port} within {START_S} s")
