"""Decisions over HTTP with the shadow, against the same without it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from time import sleep

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import Load, middle, p50, post, wrk
from tests.bench.servers import KEY, service

CANDIDATES = 20
CONNECTIONS = (1, 8, 32)
ROUNDS = 21
SECONDS = 1
DRAIN_S = 0.5
REQUESTS = 1_000


def measure(environment: Environment) -> Iterator[Comparison]:
    requests = [_request(user) for user in itertools.islice(itertools.cycle(environment.users), REQUESTS)]
    with service(environment.settings) as shadowed, service(replace(environment.settings, shadow=False)) as alone:
        for connections in CONNECTIONS:
            loads: dict[int, list[Load]] = {shadowed: [], alone: []}
            for number in range(ROUNDS):
                # The order alternates, so that a machine that gets slower affects both.
                for port in (shadowed, alone) if number % 2 else (alone, shadowed):
                    loads[port].append(wrk(port, requests, connections, SECONDS))
                    sleep(DRAIN_S)  # decisions that wait for their shadow would slow down the other service
            many = f"{connections} connection{'s' if connections > 1 else ''}"
            name = f"score, {CANDIDATES} candidates, {many}, p50, with the shadow"
            without, ours = middle(loads[alone], p50), middle(loads[shadowed], p50)
            yield Comparison(name, "the same without", without, ours, 1.1)


def _request(user_id: str) -> bytes:
    candidates = [
        {
            "id": f"tip-{number}",
            "features": {"is_overdue": number % 3 == 0, "task_age_days": number * 2, "priority": number % 5},
        }
        for number in range(CANDIDATES)
    ]
    body = {"user_id": user_id, "candidates": candidates, "context": {"at": "2026-11-25T09:30:00+01:00"}}
    return post("/score", json.dumps(body).encode(), KEY)
