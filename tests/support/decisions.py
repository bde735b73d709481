"""Writes simulated decisions into a database, as scoring and learning would store them over hours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from app.bandit.model.inputs import SPEC_V2
from app.bandit.rollout.aggregates import DecisionPage
from app.bandit.rollout.stages import Stage, Target
from app.bootstrap.service import OpenService
from app.stores.sql.database import Connection, Database
from tests.support.clock import NOW_MS
from tests.support.decision_logs import logged_page, simulate

HOUR_MS = 3_600_000
BLANK: Mapping[str, object] = {
    "explore": 1,
    "role": "champion",
    "served_by": "lints-v1",
    "policy_hash": "p",
    "spec_hash": SPEC_V2.hash,
    "state_version": 0,
    "prior_version": 1,
    "profile_origin": "service",
    "profile_present": 1,
    "chosen": 0,
    "chosen_id": "t-0",
    "elapsed_us": 4_000,
    "state": "learned",
    "theta": b"",
    "phi": b"",
    "request": "{}",
}


async def move_to(service: OpenService, stage: Stage, share: float) -> None:
    """Move the roll-out as an admin did a minute ago, without the rules for moves."""
    repository = service.bandit.rollout.repository
    await repository.move(await repository.state(), Target(stage, share), "", "ann", service.clock.now_ms() - 60_000)


def rows_of(
    page: DecisionPage, *, made_ms: int = NOW_MS - 100 * HOUR_MS, every_ms: int = 1, **changed: object
) -> list[dict[str, object]]:
    """The rows of a page of settled decisions, with some columns changed."""
    return [
        {
            **BLANK,
            "user_id": user,
            "created_at_ms": made_ms + place * every_ms,
            "role": "challenger" if served_by_challenger else "champion",
            "reward": reward,
            "reward_source": "feedback",
            "action": "completed" if reward else "dismissed" if dismissed else "snoozed",
            "champion_p": champion,
            "challenger_p": challenger,
            "agree": int(agreed),
            "q_logged": q,
            "v_champion": v_champion,
            "v_challenger": v_challenger,
            **changed,
        }
        for place, (
            user,
            reward,
            pi_b,
            champion,
            challenger,
            q,
            v_champion,
            v_challenger,
            dismissed,
            agreed,
        ) in enumerate(zip(page.users, *(map(float, column) for column in page[1:10]), strict=True))
        for served_by_challenger in (pi_b == challenger != champion,)
    ]


async def write(database: Database, rows: Sequence[Mapping[str, object]]) -> None:
    def work(connection: Connection) -> None:
        (made,) = connection.execute("SELECT COUNT(*) FROM tip_scores").fetchone()
        named = [{"decision_id": f"d-{number}", **row} for number, row in enumerate(rows, start=made)]
        for columns, alike in groupby(named, key=tuple):
            statement = f"INSERT INTO tip_scores ({', '.join(columns)}) VALUES (:{', :'.join(columns)})"
            connection.executemany(statement, list(alike))

    await database.write(work, of=())


def some(
    decisions: int, *, users: int = 400, skill: float = 1.0, share: float = 0.0, model: float = 0.5, seed: int = 1
) -> DecisionPage:
    """A page of simulated decisions (see `decision_logs.simulate`)."""
    random = np.random.default_rng(seed)
    return logged_page(random, simulate(random, users, decisions, skill=skill, spread=0.7), share=share, model=model)
