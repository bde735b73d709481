"""The shadow: what the policy that did not serve makes of each decision, worked out after the answer.

It is computed from the very snapshot that the decision was made of, in small pieces between which requests go on, and
stored for many decisions at once. Memory is bounded: where too many wait, the newcomer's shadow is dropped and counted.
A decision without one, whether dropped or lost with the process, is no part of any evaluation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from app.bandit.decisions import Decision, Ranking, Role, Shadow
from app.bandit.evidence import Evidence
from app.bandit.lineup import Lineup
from app.bandit.ports import DecisionBook
from app.bandit.ranking import best, ranking_of
from app.bandit.terms import Array
from app.bandit.together import Case, decide_together
from app.errors import Unavailable
from app.telemetry import Metrics, logger, warn

MOST_WAITING = 2_000
LINGER_S = 0.1
AT_ONCE = 200
SCORED_AT_ONCE = 8  # what is worked on then stays in a core's cache
RETRY_S = 1.0
GIVE_UP_AFTER = 30
log = logger("bandit.shadowing")


class Unshadowed(NamedTuple):
    """A decision and the snapshot it was made of: evidence, the pooled prior's mean, and φ of all candidates (K, D).

    `elapsed_us`: how long the answer took, its commit included.
    """

    decision: Decision
    evidence: Evidence
    mu: Array
    phi: Array
    elapsed_us: int = 0


class Shadower(Protocol):
    """Takes decisions whose shadow is still to be worked out."""

    def add(self, unshadowed: Unshadowed) -> None:
        """One that is stored. Never waits, never raises."""
        ...

    async def close(self) -> None:
        """Finish what was begun."""
        ...


class NoShadow:
    """There is no challenger."""

    def add(self, unshadowed: Unshadowed) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing was begun."""


class BackgroundShadower:
    """Works shadows out in the background. One per process."""

    def __init__(
        self,
        book: DecisionBook,
        lineup: Lineup,
        metrics: Metrics,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._book = book
        self._lineup = lineup
        self._metrics = metrics
        self._pause = pause
        self._waiting: deque[Unshadowed] = deque()
        self._working: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, unshadowed: Unshadowed) -> None:
        """Soon; or not at all, where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.bandit.shadows.labels("dropped").inc()
            return
        self._waiting.append(unshadowed)
        if self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Work out and store what waits; what the database does not take now is lost, and counted."""
        self._closing.set()
        if (working := self._working) is not None:
            await asyncio.gather(working, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < AT_ONCE:
                    await self._linger(LINGER_S)
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), AT_ONCE))]
                try:
                    # NumPy does most of it outside of Python's lock: requests go on meanwhile.
                    stored = await self._stored(await asyncio.to_thread(shadows_of, group, self._lineup))
                except Exception:
                    log.exception("shadow_failed")
                    stored = False
                self._metrics.bandit.shadows.labels("stored" if stored else "lost").inc(len(group))
        finally:
            self._working = None

    async def _stored(self, shadows: list[Shadow]) -> bool:
        for _ in range(GIVE_UP_AFTER):
            try:
                await self._book.add_shadows(shadows)
            except Unavailable as error:
                warn(log, error)("shadows_put_off", shadows=len(shadows), error=str(error))
                if self._closing.is_set():
                    break
                await self._linger(RETRY_S)
            else:
                return True
        return False

    async def _linger(self, seconds: float) -> None:
        """Wait so long, or until the process is about to stop."""
        if self._closing.is_set():
            return
        pause = asyncio.ensure_future(self._pause(seconds))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({pause, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pause.cancel()
            closing.cancel()


def shadows_of(group: Sequence[Unshadowed], lineup: Lineup) -> list[Shadow]:
    """Both rankings of each, and the terms of a doubly robust estimate; in no order.

    The reward model is the pooled prior that the decision names: q(φ) = φᵀμ, within [0, 1]. It was made of rewards
    known before the decision.
    """
    alike: dict[tuple[Role, int], list[Unshadowed]] = {}
    for item in group:
        alike.setdefault((item.decision.role, len(item.phi)), []).append(item)
    shadows: list[Shadow] = []
    for (role, _), items in alike.items():
        policy = lineup.policy("challenger" if role == "champion" else "champion")
        for start in range(0, len(items), SCORED_AT_ONCE):
            part = items[start : start + SCORED_AT_ONCE]
            cases = [Case(item.decision.id, item.evidence, item.mu, item.phi) for item in part]
            for item, scored in zip(part, decide_together(policy, cases), strict=True):
                shadows.append(_shadow(item, ranking_of(scored, item.decision.explore)))
    return shadows


def _shadow(unshadowed: Unshadowed, other: Ranking) -> Shadow:
    decision, _, mu, phi, elapsed_us = unshadowed
    own = decision.ranking
    champion, challenger = (own, other) if decision.role == "champion" else (other, own)
    q = np.clip(phi @ mu, 0.0, 1.0)
    return Shadow(
        decision_id=decision.id,
        champion=champion,
        challenger=challenger,
        chosen=decision.chosen,
        agree=best(champion.scores) == best(challenger.scores),
        q_logged=float(q[decision.chosen]),
        v_champion=float(champion.pi @ q),
        v_challenger=float(challenger.pi @ q),
        elapsed_us=elapsed_us,
    )
