"""Warm reads beside something else, against the same reads without, in alternating runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from tests.bench.ground import Ground
from tests.bench.load import Load, wrk
from tests.bench.serving import middle, p99, service, singles, warm, without_near
from tests.bench.timing import Comparison

ROUNDS = 5
CONNECTIONS = 8
SECONDS = 3


def reads_beside(
    ground: Ground, meanwhile: Callable[[], AbstractContextManager[None]], what: str, allowed: float
) -> Iterator[Comparison]:
    """p99 of a read while `meanwhile()` lasts, near and from the cache's server; `allowed` is the ratio asked for."""
    reads = singles(ground.users)
    with service(ground.settings) as near, service(without_near(ground.settings)) as far:
        warm(near, ground.users)
        ports = {"": near, " from the server": far}
        quiet: dict[str, list[Load]] = {how: [] for how in ports}
        busy: dict[str, list[Load]] = {how: [] for how in ports}
        for _ in range(ROUNDS):
            for how, port in ports.items():
                quiet[how].append(wrk(port, reads, CONNECTIONS, SECONDS))
                with meanwhile():
                    busy[how].append(wrk(port, reads, CONNECTIONS, SECONDS))
    for how in ports:
        name = f"warm read{how}, {CONNECTIONS} connections, p99, {what}"
        yield Comparison(name, "the same without", middle(quiet[how], p99), middle(busy[how], p99), allowed)
