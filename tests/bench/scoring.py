"""Decisions over HTTP: their cost, and the same while a worker computes their shadows.

The cost is compared with what depends on the same machine: with 32 connections, for which the CPU is the limit, with a
request to a bare ASGI application; with one, with such a request and a bare durable insert, because a decision ends
with a durable commit. On PostgreSQL, the users have no events.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from statistics import median
from time import perf_counter

import psutil  # type: ignore[import-untyped]  # publishes no types

from app.bandit.model.inputs import SPEC_V2
from app.stores.sqlite.connection import connect
from tests.bench.comparison import Comparison
from tests.bench.environment import Environment, on_postgres
from tests.bench.load import Load, cost, get, middle, p50, post, wrk
from tests.bench.servers import KEY, constant, process_environment, running, service, service_and_pid
from tests.support.waiting import eventually_sync

CANDIDATES = 20
CONNECTIONS = (1, 8, 32)
ROUNDS = 21
SECONDS = 1
DRAINED_S = 60.0
BACKLOG_S = 600.0  # for the decisions of the measurement before, which had no worker
MISSING = f"SELECT 1 FROM tip_scores WHERE spec_hash = '{SPEC_V2.hash}' AND champion_p IS NULL LIMIT 1"
REQUESTS = 1_000
INSERTS = 200
INSERT = "INSERT INTO audit_trail (at_ms, actor, action, subject, outcome) VALUES (0, 'bench', 'insert', 'row', 'ok')"


def measure(environment: Environment) -> Iterator[Comparison]:
    requests = [_request(user) for user in itertools.islice(itertools.cycle(environment.users), REQUESTS)]
    yield from _costs(environment, requests)
    file = environment.settings.require_file()

    def shadowed_on_sqlite() -> bool:
        with closing(sqlite3.connect(file, timeout=10)) as connection:
            return connection.execute(MISSING).fetchone() is None

    yield from _with_shadows(environment, requests, "score", shadowed_on_sqlite)
    with on_postgres(environment) as (there, server):
        yield from _with_shadows(there, requests, "score on PostgreSQL", lambda: not server.execute(MISSING, "bench"))


def _costs(environment: Environment, requests: list[bytes]) -> Iterator[Comparison]:
    copy = environment.settings.require_file().with_name("reference.db")
    shutil.copyfile(environment.settings.require_file(), copy)
    inserts: list[float] = []
    one: list[Load] = []
    many: list[Load] = []
    bare_one: list[Load] = []
    bare: list[Load] = []
    cpu: list[float] = []
    with (
        closing(connect(copy, read_only=False)) as plain,
        constant() as minimal,
        service_and_pid(environment.settings) as (port, pid),
    ):
        wrk(port, requests, CONNECTIONS[-1], SECONDS)
        for _ in range(ROUNDS):
            inserts.append(_insert_s(plain))
            bare_one.append(wrk(minimal, [get("/")], 1, SECONDS))
            one.append(wrk(port, requests, 1, SECONDS))
            bare.append(wrk(minimal, [get("/")], CONNECTIONS[-1], SECONDS))
            before = _cpu_s(pid)
            many.append(wrk(port, requests, CONNECTIONS[-1], SECONDS))
            cpu.append((_cpu_s(pid) - before) / (many[-1].rate * SECONDS))
    name = f"decision, {CANDIDATES} candidates"
    reference = middle(bare_one, p50) + median(inserts)
    # `tests/README.md` derives the limits.
    yield Comparison(
        f"{name}, 1 connection, p50", "bare ASGI constant and a durable insert", reference, middle(one, p50), 11.5
    )
    busy = f"{name}, {CONNECTIONS[-1]} connections"
    yield Comparison(busy, "bare ASGI constant", middle(bare, cost), middle(many, cost), 32)
    yield Comparison(f"{busy}, CPU of the process", "time per decision", middle(many, cost), median(cpu))


def _insert_s(connection: sqlite3.Connection) -> float:
    """The median seconds of a transaction that inserts one row, when the WAL need not grow."""
    taken: list[float] = []
    for _ in range(INSERTS):
        started = perf_counter()
        connection.execute(INSERT)
        taken.append(perf_counter() - started)
    connection.execute("PRAGMA wal_checkpoint(RESTART)")
    return median(taken)


def _cpu_s(pid: int) -> float:
    """The CPU time that a process has used."""
    used = psutil.Process(pid).cpu_times()
    return float(used.user + used.system)


def _with_shadows(
    environment: Environment, requests: list[bytes], name: str, all_shadowed: Callable[[], bool]
) -> Iterator[Comparison]:
    worker = {**process_environment(environment.settings), "PROFILES_WORKER_METRICS_PORT": "0"}
    with (
        running([sys.executable, "-m", "app", "worker"], worker),
        service(environment.settings) as shadowed,
        service(replace(environment.settings, shadow=False)) as alone,
    ):
        eventually_sync(all_shadowed, BACKLOG_S)
        for connections in CONNECTIONS:
            loads: dict[int, list[Load]] = {shadowed: [], alone: []}
            for number in range(ROUNDS):
                # The order alternates, so that a machine that gets slower affects both.
                for port in (shadowed, alone) if number % 2 else (alone, shadowed):
                    loads[port].append(wrk(port, requests, connections, SECONDS))
                    # Decisions that wait for their shadow would slow down the other service.
                    eventually_sync(all_shadowed, DRAINED_S)
            many = f"{connections} connection{'s' if connections > 1 else ''}"
            without, ours = middle(loads[alone], p50), middle(loads[shadowed], p50)
            what = f"{name}, {CANDIDATES} candidates, {many}, p50, with the shadow"
            yield Comparison(what, "the same without", without, ours, 1.1)


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
