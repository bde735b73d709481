"""Wording a tip: the model is asked where there is one, and the template stands in for whatever goes wrong.

Invariants: every text keeps the rules of `app.generation.text_rules`, whatever the model returns. At most `at_once`
calls run at a time; a request beyond that gets the template at once. While the model is skipped, no call begins. After
a stop, no call lasts longer than `STOPPING_S`.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from app.errors import FallbackReason, ModelFailed
from app.features.clock import Clock
from app.generation.ports import Order, Writer
from app.generation.prompt import PROMPT_VERSION
from app.generation.template import worded
from app.generation.text_rules import links, problem_of, tidied
from app.telemetry import Metrics, logger

NOT_ASKED = frozenset({"circuit open", "busy", "stopping"})
SKIP_AFTER = 3  # failures in a row
SKIP_S, LONGEST_SKIP_S = 5.0, 60.0
STOPPING_S = 1.5  # of the five seconds that a process takes to stop at most
log = logger("generation")


class Written(NamedTuple):
    """A tip. Without a `model` the template wrote it; `reason` says why, where a model should have."""

    text: str
    model: str | None
    reason: FallbackReason | None
    prompt_version: str = PROMPT_VERSION


class Model(NamedTuple):
    """A writer that may fail, its name, and how many calls it takes at once."""

    writer: Writer
    name: str
    at_once: int


class Writing:
    """One per process."""

    def __init__(self, model: Model | None, clock: Clock, metrics: Metrics) -> None:
        """Without a model every tip is worded by the template, and that is no failure."""
        self._model = model
        self._clock = clock
        self._metrics = metrics
        self._failures = 0
        self._skip_until = 0.0
        self._under_way: set[asyncio.Timeout] = set()
        self._stopping = False

    async def write(self, order: Order) -> Written:
        """Word a tip; never fails."""
        if self._model is None:
            self._metrics.generations.labels("template").inc()
            return Written(worded(order), None, None)
        try:
            written = Written(await self._asked(self._model, order), self._model.name, None)
        except ModelFailed as failed:
            tell = log.debug if failed.reason in NOT_ASKED else log.info  # a line for each would add to the load
            tell("model_failed", reason=failed.reason, detail=str(failed))
            written = Written(worded(order), None, failed.reason)
        except Exception:  # a defect; the tip is worded all the same
            log.exception("model_failed")
            written = Written(worded(order), None, "internal error")
        self._metrics.generations.labels(written.reason or "model").inc()
        return written

    def stop(self) -> None:
        """The process is about to end: ask no model any more, and wait shortly for the answers under way."""
        if self._stopping:
            return
        self._stopping = True
        for timer in self._under_way:
            timer.reschedule(asyncio.get_running_loop().time() + STOPPING_S)

    async def _asked(self, model: Model, order: Order) -> str:
        if self._stopping:
            raise ModelFailed("stopping", "the process is about to end", well=True)
        if len(self._under_way) >= model.at_once:
            raise ModelFailed("busy", f"{model.at_once} calls are under way", well=True)
        started = self._clock.monotonic()
        if started < self._skip_until:
            raise ModelFailed("circuit open", "it failed several times in a row")
        try:
            text = tidied(await self._until_stopped(model, order))
        except ModelFailed as failed:
            self._note(started, well=failed.well, pause_s=failed.pause_s)
            raise
        except Exception:
            self._note(started, well=False)
            raise
        self._note(started, well=True)
        if (problem := problem_of(text, may_link=links(order.task.title))) is not None:
            raise ModelFailed("invalid answer", f"the text is no tip: {problem}", well=True)
        return text

    def _note(self, started: float, *, well: bool, pause_s: float | None = None) -> None:
        """Record a call that has ended, and skip the model after a series of failures.

        After the pause every call goes to the model again; one more failure begins the next pause. A call that began
        before a pause and fails within it may lengthen the pause but not shorten it.
        """
        now = self._clock.monotonic()
        self._metrics.model_seconds.observe(now - started)
        self._failures = 0 if well else self._failures + 1
        if self._failures >= SKIP_AFTER:
            skip_s = min(LONGEST_SKIP_S, max(SKIP_S, pause_s or 0.0))
            self._skip_until = max(self._skip_until, now + skip_s)
            log.warning("model_skipped", for_s=skip_s)

    async def _until_stopped(self, model: Model, order: Order) -> str:
        timer = asyncio.timeout(None)
        try:
            async with timer:
                self._under_way.add(timer)
                return await model.writer.write(order)
        except TimeoutError:
            if not timer.expired():
                raise
            raise ModelFailed("stopping", "the process is about to end", well=True) from None
        finally:
            self._under_way.discard(timer)
