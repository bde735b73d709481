"""Ranking, learning and growing: what a decision costs beside its arithmetic, and what the shadow adds to it."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from statistics import median
from time import perf_counter, sleep

import numpy as np
import uvloop

from app.bandit.decisions import ScoringRequest
from app.bandit.model.inputs import Candidate, Context
from app.bandit.model.policy import CHAMPION, sample
from app.bandit.model.specs import SPEC_V1, SPEC_V2
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bootstrap.service import OpenService, open_service
from app.features.clock import EPOCH, MILLISECOND
from app.features.events import Action, TipFeedback
from app.stores.sqlite.states import UPSERT_STATE
from tests.bench.ground import Ground
from tests.bench.load import Load, post, wrk
from tests.bench.serving import KEY, middle, p50, p99, seconds, service
from tests.bench.timing import Comparison, Curve, Result

CANDIDATES = 20
CONNECTIONS = (1, 8, 32)
ROUNDS = 21
SECONDS = 1
DRAIN_S = 0.5
REQUESTS = 1_000
DECISIONS = 2_000
EVENTS_AT_ONCE = 500
STATES = 10_000
GROWN_AT_ONCE = 100
SHADOW, ALONE = "with the shadow", "without"


def measure(ground: Ground) -> Iterator[Result]:
    """Seconds per decision over HTTP, per event learned, and per user's evidence grown."""
    yield from _decisions(ground)
    yield uvloop.run(_learning(ground))
    yield uvloop.run(_growing(ground))


def _decisions(ground: Ground) -> Iterator[Result]:
    requests = [_request(user) for user in itertools.islice(itertools.cycle(ground.users), REQUESTS)]
    with service(ground.settings) as shadowed, service(replace(ground.settings, shadow=False)) as alone:
        loads: dict[str, list[list[Load]]] = {SHADOW: [], ALONE: []}
        for connections in CONNECTIONS:
            for taken in loads.values():
                taken.append([])
            for round_ in range(ROUNDS):
                turns = list(zip((shadowed, alone), loads.values(), strict=True))
                # Now this one first, now the other, so that a machine that gets slower is on nobody's account.
                for port, taken in turns if round_ % 2 else reversed(turns):
                    taken[-1].append(wrk(port, requests, connections, SECONDS))
                    sleep(DRAIN_S)  # what waits for its shadow would be on the other one's account
    at = {name: dict(zip(CONNECTIONS, taken, strict=True)) for name, taken in loads.items()}
    arithmetic = _arithmetic()
    name = f"score, {CANDIDATES} candidates"
    against = "its NumPy arithmetic alone"
    yield Comparison(f"{name}, 1 connection, p50", against, arithmetic, middle(at[SHADOW][1], p50))
    yield Comparison(f"{name}, 32 connections, per decision", against, arithmetic, middle(at[SHADOW][32], seconds))
    for connections in CONNECTIONS:
        many = f"{connections} connection{'s' if connections > 1 else ''}"
        with_shadow, without = (middle(at[kind][connections], p50) for kind in (SHADOW, ALONE))
        yield Comparison(f"{name}, {many}, p50, with the shadow", "the same without", without, with_shadow, 1.1)
    for title, unit, figure in (
        ("decisions per second", "decisions per second", lambda load: load.rate),
        ("latency p50 of a decision", "seconds", p50),
        ("latency p99 of a decision", "seconds", p99),
    ):
        series = {who: [middle(rounds, figure) for rounds in taken] for who, taken in loads.items()}
        yield Curve(f"{title} over connections", "connections", unit, CONNECTIONS, series)


def _arithmetic() -> float:
    """Seconds that φ, the posterior, its draws, the propensities and the sampling of one decision take."""
    random = np.random.default_rng(6)
    evidence = SufficientStatistics.none(SPEC_V2)
    for _ in range(20):
        evidence = evidence.learned(random.uniform(-1, 1, SPEC_V2.size), 0.5)
    candidates, context = _candidates(), Context()
    profile = {"completion_rate_30d": 0.5, "tip_volume_30d": 12, "preferred_hour": 9}
    times: list[float] = []
    for number in range(2_000):
        started = perf_counter()
        phi = SPEC_V2.phi(candidates, context, profile)
        sample(CHAMPION.decide(str(number), evidence, None, phi).pi, str(number))
        times.append(perf_counter() - started)
    return median(times)


async def _learning(ground: Ground) -> Comparison:
    """Consumption of feedback that settles a decision each, against feedback that names none."""
    async with open_service(ground.settings, door="bench") as opened:
        settling = [await _decided(opened, user) for user in itertools.islice(itertools.cycle(ground.users), DECISIONS)]
        plain = [(user, "tip-of-nobody", None) for user, _, _ in settling]
        without = await _consumed(opened, "plain-", plain, ground.now_ms)
        learning = await _consumed(opened, "settling-", settling, ground.now_ms)
        found = [await opened.bandit.decisions.find(decision_id or "") for _, _, decision_id in settling]
    assert all(each is not None and each[1].state == "learned" for each in found)
    return Comparison("consume an event that a decision learns from", "an event without a decision", without, learning)


async def _decided(opened: OpenService, user_id: str) -> tuple[str, str, str | None]:
    decision = await opened.bandit.scorer.score(
        ScoringRequest(user_id=user_id, candidates=_candidates(), context=Context(), origin="absent")
    )
    return user_id, decision.chosen_id, decision.id


async def _consumed(
    opened: OpenService, prefix: str, feedback: Sequence[tuple[str, str, str | None]], now_ms: int
) -> float:
    """Seconds per event."""
    events = [
        TipFeedback(
            event_id=f"{prefix}{number}",
            user_id=user_id,
            tip_id=tip_id,
            occurred_at=EPOCH + now_ms * MILLISECOND,
            action=Action.COMPLETED,
            dwell_ms=None,
            decision_id=decision_id,
        )
        for number, (user_id, tip_id, decision_id) in enumerate(feedback)
    ]
    before = await _last_seq(opened)  # the demonstration set waits to be consumed, too
    for start in range(0, len(events), EVENTS_AT_ONCE):
        await opened.ingestor.ingest(events[start : start + EVENTS_AT_ONCE])
    seqs = range(before + 1, await _last_seq(opened) + 1)
    assert len(seqs) == len(events)
    started = perf_counter()
    for start in range(0, len(seqs), EVENTS_AT_ONCE):
        await opened.consumer.consume(seqs[start : start + EVENTS_AT_ONCE])
    return (perf_counter() - started) / len(seqs)


async def _last_seq(opened: OpenService) -> int:
    (seq,) = await opened.database.read(lambda c: c.execute("SELECT MAX(seq) FROM event_log").fetchone())
    return int(seq)


async def _growing(ground: Ground) -> Comparison:
    """The backfill of evidence of the short spec, against sqlite3 that makes the same short rows as long."""
    _store_states(ground)
    async with open_service(ground.settings, door="bench") as opened:
        started = perf_counter()
        grown = 0
        while page := await opened.bandit.states.grow(GROWN_AT_ONCE, ground.now_ms):
            grown += page
        ours = (perf_counter() - started) / grown
    assert grown == STATES
    return Comparison(
        "grow a user's evidence, 100 a commit", "sqlite3 executemany, the same rows", _rewritten(ground), ours
    )


def _store_states(ground: Ground) -> None:
    blob = SufficientStatistics.none(SPEC_V1).pack()
    with closing(sqlite3.connect(ground.settings.database)) as connection, connection:
        connection.execute("DELETE FROM bandit_states")
        rows = ((f"grown-{number}", SPEC_V1.hash, blob, 0, ground.now_ms) for number in range(STATES))
        connection.executemany(UPSERT_STATE, rows)


def _rewritten(ground: Ground) -> float:
    """Seconds per row that becomes as long as grown evidence, durably, as many a commit as the backfill writes.

    Long rows in the place of long ones would be far cheaper: what costs is that the table's pages split.
    """
    _store_states(ground)
    blob = SufficientStatistics.none(SPEC_V2).pack()
    with closing(sqlite3.connect(ground.settings.database, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        started = perf_counter()
        for first in range(0, STATES, GROWN_AT_ONCE):
            page = range(first, first + GROWN_AT_ONCE)
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                UPSERT_STATE, [(f"grown-{number}", SPEC_V2.hash, blob, 0, ground.now_ms) for number in page]
            )
            connection.execute("COMMIT")
        return (perf_counter() - started) / STATES


def _request(user_id: str) -> bytes:
    candidates = [
        {
            "id": candidate.id,
            "features": {
                "is_overdue": candidate.is_overdue,
                "task_age_days": candidate.task_age_days,
                "priority": candidate.priority,
            },
        }
        for candidate in _candidates()
    ]
    body = {"user_id": user_id, "candidates": candidates, "context": {"at": "2026-11-25T09:30:00+01:00"}}
    return post("/score", json.dumps(body).encode(), KEY)


def _candidates() -> tuple[Candidate, ...]:
    return tuple(
        Candidate(f"tip-{number}", number % 3 == 0, float(number * 2), float(number % 5))
        for number in range(CANDIDATES)
    )
