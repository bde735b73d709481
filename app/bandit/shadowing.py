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
from app.bandit.policy import greedy
from app.bandit.ports import DecisionBook
from app.bandit.terms import Array
from app.errors import Unavailable
from app.telemetry import Metrics, logger, warn

MOST_WAITING = 2_000
LINGER_S = 0.1
AT_ONCE = 200
RETRY_S = 1.0
GIVE_UP_AFTER = 30
log = logger("bandit.shadowing")


class Unshadowed(NamedTuple):
    """A decision and the snapshot it was made of: evidence, the pooled prior's mean, and φ of all candidates (K, D)."""

    decision: Decision
    evidence: Evidence
    mu: Array
    phi: Array


class Shadower(Protocol):
    """Takes decisions whose shadow is still to be worked out."""

    def add(self, unshadowed: Unshadowed, elapsed_us: int) -> None:
        """One that is stored and answered after so long. Never waits, never raises."""
        ...

    async def close(self) -> None:
        """Finish what was begun."""
        ...


class NoShadow:
    """There is no challenger."""

    def add(self, unshadowed: Unshadowed, elapsed_us: int) -> None:
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
        self._waiting: deque[tuple[Unshadowed, int]] = deque()
        self._working: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(self, unshadowed: Unshadowed, elapsed_us: int) -> None:
        """Soon; or not at all, where too many wait."""
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.bandit.shadows.labels("dropped").inc()
            return
        self._waiting.append((unshadowed, elapsed_us))
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
                await self._store(await asyncio.to_thread(self._shadows, group))
        except Exception:
            self._metrics.bandit.shadows.labels("lost").inc()
            log.exception("shadow_failed")
        finally:
            self._working = None

    def _shadows(self, group: Sequence[tuple[Unshadowed, int]]) -> list[Shadow]:
        return [shadow_of(unshadowed, self._lineup, elapsed_us) for unshadowed, elapsed_us in group]

    async def _store(self, shadows: list[Shadow]) -> None:
        for _ in range(GIVE_UP_AFTER):
            try:
                await self._book.add_shadows(shadows)
            except Unavailable as error:
                warn(log, error)("shadows_put_off", shadows=len(shadows), error=str(error))
                if self._closing.is_set():
                    break
                await self._linger(RETRY_S)
            else:
                self._metrics.bandit.shadows.labels("stored").inc(len(shadows))
                return
        self._metrics.bandit.shadows.labels("lost").inc(len(shadows))

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


def shadow_of(unshadowed: Unshadowed, lineup: Lineup, elapsed_us: int) -> Shadow:
    """Both rankings, and the terms of a doubly robust estimate.

    The reward model is the pooled prior that the decision names: q(φ) = φᵀμ, within [0, 1]. It was made of rewards
    known before the decision.
    """
    decision, evidence, mu, phi = unshadowed
    other: Role = "challenger" if decision.role == "champion" else "champion"
    scored = lineup.policy(other).decide(decision.id, evidence, mu, phi)
    pi = scored.pi if decision.explore else np.eye(len(phi))[greedy(scored.means)]
    ranking = Ranking(scored.means, pi)
    champion, challenger = (decision.ranking, ranking) if decision.role == "champion" else (ranking, decision.ranking)
    q = np.clip(phi @ mu[: phi.shape[1]], 0.0, 1.0)
    return Shadow(
        decision_id=decision.id,
        champion=champion,
        challenger=challenger,
        chosen=decision.chosen,
        agree=greedy(champion.scores) == greedy(challenger.scores),
        q_logged=float(q[decision.chosen]),
        v_champion=float(champion.pi @ q),
        v_challenger=float(challenger.pi @ q),
        elapsed_us=elapsed_us,
    )
