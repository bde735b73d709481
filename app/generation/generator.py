"""Generates the text of a tip, by the language model if there is one, and by the template if the call fails.

Invariants:
- Every text passes `app.generation.text_rules.text_problem`, whatever the model returns. A text of the model may have a
  link if the task's title has one, and a text of the template if the title or the notes have one.
- At most `at_once` calls of the model run at a time. A request beyond that gets the template at once.
- No call starts while the model is skipped after repeated failures.
- After `stop`, no call lasts longer than `STOPPING_S`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.errors import FallbackReason, ModelFailed
from app.features.clock import Clock
from app.generation.prompt import PROMPT_VERSION
from app.generation.template import template_tip
from app.generation.text_rules import has_link, single_spaced, text_problem
from app.generation.tip_request import TipRequest
from app.telemetry import Metrics, logger

NOT_CALLED = frozenset({"circuit open", "busy", "stopping"})
SKIP_AFTER = 3  # failures in a row
SKIP_S, LONGEST_SKIP_S = 5.0, 60.0
STOPPING_S = 1.5  # a process must stop within five seconds
log = logger("generation")


class GeneratedTip(msgspec.Struct, kw_only=True):
    """The text of a tip, and whether a model or a template wrote it."""

    text: Annotated[str, Meta(description="One paragraph of plain text, at most 500 characters.")]
    source: Literal["model", "template"]
    fallback_reason: Annotated[FallbackReason | UnsetType, Meta(description="Why the model did not write it.")] = UNSET
    model: Annotated[str | UnsetType, Meta(description="The model that wrote it.")] = UNSET
    prompt_version: Annotated[str, Meta(description="Changes with the prompt.")]


class Model(NamedTuple):
    """A language model. `write` calls it within a bounded time and returns the text, which is not yet checked, or
    raises `ModelFailed`. At most `at_once` calls may run concurrently."""

    write: Callable[[TipRequest], Awaitable[str]]
    name: str
    at_once: int


class TipGenerator(msgspec.Struct, eq=False):
    """Generates tips with the `model`, or with the template if the model fails. If `model` is None, the template writes
    every tip, which is not counted as a failure."""

    model: Model | None
    clock: Clock
    metrics: Metrics
    _failures: int = 0
    _skip_until: float = 0.0
    _under_way: set[asyncio.Timeout] = msgspec.field(default_factory=set)
    _stopping: bool = False

    async def write(self, request: TipRequest) -> GeneratedTip:
        reason: FallbackReason | UnsetType = UNSET
        if self.model is not None:
            try:
                text = await self._ask(self.model, request)
                self.metrics.generations.labels("model").inc()
                return GeneratedTip(text=text, source="model", model=self.model.name, prompt_version=PROMPT_VERSION)
            except ModelFailed as failed:
                # At the level info, requests that make no call would write one line each while the service is busy.
                write_log = log.debug if failed.reason in NOT_CALLED else log.info
                write_log("model_failed", reason=failed.reason, detail=str(failed))
                reason = failed.reason
            except Exception:  # a defect of this service; the request gets a tip all the same
                log.exception("model_failed")
                reason = "internal error"
        self.metrics.generations.labels(reason or "template").inc()
        text = template_tip(request)
        return GeneratedTip(text=text, source="template", fallback_reason=reason, prompt_version=PROMPT_VERSION)

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
        started, timer = self.clock.monotonic(), asyncio.timeout(None)
        if started < self._skip_until:
            raise ModelFailed("circuit open", "it failed several times in a row")
        try:
            async with timer:
                self._under_way.add(timer)
                text = single_spaced(await model.write(request))
        except Exception as error:
            if isinstance(error, TimeoutError) and timer.expired():
                raise ModelFailed("stopping", "the process is about to end", well=True) from None
            self._note(started, error)
            raise
        finally:
            self._under_way.discard(timer)
        self._note(started)
        if (problem := text_problem(text, may_link=has_link(request.title))) is not None:
            raise ModelFailed("invalid answer", f"the text cannot be shown: {problem}", well=True)
        return text

    def _note(self, started: float, error: Exception | None = None) -> None:
        """Record that a call begun at `started` has ended, with this error if it failed. After `SKIP_AFTER` failures in
        a row, skip the model for `SKIP_S` seconds, or for as long as the endpoint asked its clients to wait, but for at
        most `LONGEST_SKIP_S`. Then requests call it again, and one more failure begins the next skip. A `ModelFailed`
        with `well` set is counted as a success here. A call that began before a skip and fails during it can make the
        skip longer, never shorter."""
        now = self.clock.monotonic()
        self.metrics.model_seconds.observe(now - started)
        failed = error if isinstance(error, ModelFailed) else None
        self._failures = 0 if error is None or (failed is not None and failed.well) else self._failures + 1
        if self._failures >= SKIP_AFTER:
            pause_s = 0.0 if failed is None else failed.pause_s or 0.0
            skip_s = min(LONGEST_SKIP_S, max(SKIP_S, pause_s))
            self._skip_until = max(self._skip_until, now + skip_s)
            log.warning("model_skipped", for_s=skip_s)
