"""Generates the text of a tip: calls the language model if there is one, and uses the template if the call fails.

Invariants:
- Every text passes `app.generation.text_rules.text_problem`, whatever the model returns.
- At most `at_once` calls of the model run at a time. A request beyond that gets the template at once.
- No call starts while the model is skipped after repeated failures.
- After `stop`, no call lasts longer than `STOPPING_S`.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import msgspec

from app.errors import FallbackReason, ModelFailed
from app.features.clock import Clock
from app.generation.ports import TipRequest, Writer
from app.generation.prompt import PROMPT_VERSION
from app.generation.template import template_tip
from app.generation.text_rules import has_link, single_spaced, text_problem
from app.telemetry import Metrics, logger

NOT_CALLED = frozenset({"circuit open", "busy", "stopping"})
SKIP_AFTER = 3  # failures in a row
SKIP_S, LONGEST_SKIP_S = 5.0, 60.0
STOPPING_S = 1.5  # a process must stop within five seconds
log = logger("generation")


class WrittenTip(NamedTuple):
    """The text of a tip, and its origin. `model` is the name of the model that wrote it, None for the template.
    `reason` says why the model did not write the text; None if it did, or if no model is set."""

    text: str
    model: str | None
    reason: FallbackReason | None
    prompt_version: str = PROMPT_VERSION


class Model(NamedTuple):
    """A language model: the writer that calls it, its name, and the largest number of concurrent calls."""

    writer: Writer
    name: str
    at_once: int


class TipGenerator(msgspec.Struct, eq=False):
    """Writes tips. If `model` is None, the template writes every tip, which is not counted as a failure."""

    model: Model | None
    clock: Clock
    metrics: Metrics
    _failures: int = 0
    _skip_until: float = 0.0
    _under_way: set[asyncio.Timeout] = msgspec.field(default_factory=set)
    _stopping: bool = False

    async def write(self, request: TipRequest) -> WrittenTip:
        """Generate a tip, with the template if the model fails; no error is raised."""
        if self.model is None:
            self.metrics.generations.labels("template").inc()
            return WrittenTip(template_tip(request), None, None)
        try:
            tip = WrittenTip(await self._ask(self.model, request), self.model.name, None)
        except ModelFailed as failed:
            # At the level info, requests that make no call would write one line each while the service is busy.
            write_log = log.debug if failed.reason in NOT_CALLED else log.info
            write_log("model_failed", reason=failed.reason, detail=str(failed))
            tip = WrittenTip(template_tip(request), None, failed.reason)
        except Exception:  # a defect of this service; the request gets a tip all the same
            log.exception("model_failed")
            tip = WrittenTip(template_tip(request), None, "internal error")
        self.metrics.generations.labels(tip.reason or "model").inc()
        return tip

    def stop(self) -> None:
        """Start no more calls of the model, and end the calls in progress within `STOPPING_S` seconds."""
        if self._stopping:
            return
        self._stopping = True
        for timer in self._under_way:
            timer.reschedule(asyncio.get_running_loop().time() + STOPPING_S)

    async def _ask(self, model: Model, request: TipRequest) -> str:
        if self._stopping:
            raise ModelFailed("stopping", "the process is about to end", well=True)
        if len(self._under_way) >= model.at_once:
            raise ModelFailed("busy", f"{model.at_once} calls are in progress", well=True)
        started = self.clock.monotonic()
        if started < self._skip_until:
            raise ModelFailed("circuit open", "it failed several times in a row")
        try:
            text = single_spaced(await self._until_stopped(model, request))
        except ModelFailed as failed:
            self._note(started, well=failed.well, pause_s=failed.pause_s)
            raise
        except Exception:
            self._note(started, well=False)
            raise
        self._note(started, well=True)
        if (problem := text_problem(text, may_link=has_link(request.task.title))) is not None:
            raise ModelFailed("invalid answer", f"the text is no tip: {problem}", well=True)
        return text

    def _note(self, started: float, *, well: bool, pause_s: float | None = None) -> None:
        """Record a call that began at `started` and has ended. After `SKIP_AFTER` failures in a row, skip the model for
        `SKIP_S` seconds, or for `pause_s` seconds if the endpoint asked its clients to wait longer, but at most for
        `LONGEST_SKIP_S`.

        `well` means that the endpoint works, even if the call failed; the count of failures starts again at 0. After a
        skip, requests call the model again, and one more failure begins the next skip. A call that began before a skip
        and fails during it can make the skip longer, never shorter.
        """
        now = self.clock.monotonic()
        self.metrics.model_seconds.observe(now - started)
        self._failures = 0 if well else self._failures + 1
        if self._failures >= SKIP_AFTER:
            skip_s = min(LONGEST_SKIP_S, max(SKIP_S, pause_s or 0.0))
            self._skip_until = max(self._skip_until, now + skip_s)
            log.warning("model_skipped", for_s=skip_s)

    async def _until_stopped(self, model: Model, request: TipRequest) -> str:
        timer = asyncio.timeout(None)
        try:
            async with timer:
                self._under_way.add(timer)
                return await model.writer.write(request)
        except TimeoutError:
            if not timer.expired():
                raise
            raise ModelFailed("stopping", "the process is about to end", well=True) from None
        finally:
            self._under_way.discard(timer)
