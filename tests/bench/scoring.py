"""Decisions over HTTP while a worker computes their shadows, against the same without a challenger."""

from __future__ import annotations

import itertools
import json
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from app.bandit.model.specs import SPEC_V2
from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.load import Load, middle, p50, post, wrk
from tests.bench.servers import KEY, process_environment, running, service
from tests.support.waiting import eventually_sync

CANDIDATES = 20
CONNECTIONS = (1, 8, 32)
ROUNDS = 21
SECONDS = 1
DRAINED_S = 60.0
MISSING = "SELECT 1 FROM tip_scores WHERE spec_hash = ? AND champion_p IS NULL LIMIT 1"
REQUESTS = 1_000


def measure(environment: Environment) -> Iterator[Comparison]:
    requests = [_request(user) for user in itertools.islice(itertools.cycle(environment.users), REQUESTS)]
    worker = {**process_environment(environment.settings), "PROFILES_WORKER_METRICS_PORT": "0"}
    with (
        running([sys.executable, "-m", "app", "worker"], worker),
        service(environment.settings) as shadowed,
        service(replace(environment.settings, shadow=False)) as alone,
    ):
        for connections in CONNECTIONS:
            loads: dict[int, list[Load]] = {shadowed: [], alone: []}
            for number in range(ROUNDS):
                # The order alternates, so that a machine that gets slower affects both.
                for port in (shadowed, alone) if number % 2 else (alone, shadowed):
                    loads[port].append(wrk(port, requests, connections, SECONDS))
                    # Decisions that wait for their shadow would slow down the other service.
                    eventually_sync(partial(_all_shadowed, environment.settings.require_file()), DRAINED_S)
            many = f"{connections} connection{'s' if connections > 1 else ''}"
            name = f"score, {CANDIDATES} candidates, {many}, p50, with the shadow"
            without, ours = middle(loads[alone], p50), middle(loads[shadowed], p50)
            yield Comparison(name, "the same without", without, ours, 1.1)


def _all_shadowed(database: Path) -> bool:
    with closing(sqlite3.connect(database, timeout=10)) as connection:
        return connection.execute(MISSING, (SPEC_V2.hash,)).fetchone() is None


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
