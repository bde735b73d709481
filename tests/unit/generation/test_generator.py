"""The tip generator: it gives a tip whatever the model does, and the reason if the template wrote it."""

import asyncio
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, UnsetType

from app.errors import FallbackReason, ModelFailed
from app.generation.generator import LONGEST_SKIP_S, SKIP_AFTER, SKIP_S, GeneratedTip, Model, TipGenerator
from app.generation.prompt import PROMPT_VERSION
from app.generation.template import template_tip
from app.generation.text_rules import text_problem
from app.generation.tip_request import TipRequest
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.tip_requests import tip_request
from tests.support.waiting import eventually

REQUEST = tip_request()
TEMPLATE = template_tip(REQUEST)


def from_template(reason: FallbackReason | UnsetType = UNSET) -> GeneratedTip:
    return GeneratedTip(text=TEMPLATE, source="template", fallback_reason=reason, prompt_version=PROMPT_VERSION)


def from_model(text: str) -> GeneratedTip:
    return GeneratedTip(text=text, source="model", model="m-1", prompt_version=PROMPT_VERSION)


class FakeWriter:
    """A writer that returns or raises `outcome` while `gate` is set."""

    def __init__(self, outcome: str | Exception) -> None:
        self.outcome = outcome
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, request: TipRequest) -> str:
        self.calls += 1
        await self.gate.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class GeneratorFixture:
    """A generator with a fake writer and a fake clock."""

    def __init__(self, outcome: str | Exception = "A tip.", at_once: int = 2) -> None:
        self.writer = FakeWriter(outcome)
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.tips = TipGenerator(Model(self.writer.write, "m-1", at_once), self.clock, self.metrics)

    async def generate(self, request: TipRequest = REQUEST) -> GeneratedTip:
        return await self.tips.write(request)

    async def reasons(self, count: int) -> list[FallbackReason | UnsetType]:
        """The reasons of that many tips."""
        return [(await self.generate()).fallback_reason for _ in range(count)]

    async def pending(self, calls: int = 1) -> list[asyncio.Task[GeneratedTip]]:
        """Requests whose calls wait for the gate."""
        self.writer.gate.clear()
        expected = self.writer.calls + calls
        tasks = [asyncio.get_running_loop().create_task(self.generate()) for _ in range(calls)]
        await eventually(lambda: self.writer.calls == expected)
        return tasks

    def counted(self, outcome: str) -> float:
        """The number of tips with this outcome."""
        return self.metrics.collectors.get_sample_value("profiles_generations_total", {"outcome": outcome}) or 0.0

    @property
    def timed(self) -> float:
        """The number of timed calls."""
        return self.metrics.collectors.get_sample_value("profiles_model_seconds_count") or 0.0


async def test_template_writes_the_tip_without_a_reason_when_there_is_no_model() -> None:
    metrics = Metrics()
    tip = await TipGenerator(None, FakeClock(), metrics).write(REQUEST)
    assert tip == from_template()
    assert metrics.collectors.get_sample_value("profiles_generations_total", {"outcome": "template"}) == 1


async def test_model_writes_the_tip_when_there_is_one() -> None:
    fixture = GeneratorFixture("  A tip\nof two lines. ")
    assert await fixture.generate() == from_model("A tip of two lines.")
    assert (fixture.counted("model"), fixture.timed) == (1, 1)


@pytest.mark.parametrize("reason", get_args(FallbackReason))
async def test_template_writes_the_tip_with_a_reason_when_the_model_fails(reason: FallbackReason) -> None:
    fixture = GeneratorFixture(ModelFailed(reason, "it did"))
    assert await fixture.generate() == from_template(reason)
    assert (fixture.counted(reason), fixture.timed) == (1, 1)


async def test_template_writes_the_tip_when_the_writer_has_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    fixture = GeneratorFixture(KeyError("defect"))
    assert await fixture.generate() == from_template("internal error")
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " ", "…", "x" * 501, "a\x1bb", "see http://evil.example", "\U000e0041 x"])
async def test_text_is_refused_when_it_is_no_tip(text: str) -> None:
    fixture = GeneratorFixture(text)
    for _ in range(2 * SKIP_AFTER):  # never skips the model
        assert await fixture.generate() == from_template("invalid answer")
    assert fixture.writer.calls == 2 * SKIP_AFTER


@given(st.text())
async def test_tip_keeps_the_rules_whatever_the_model_returns(text: str) -> None:
    tip = await GeneratorFixture(text).generate()
    assert text_problem(tip.text) is None


async def test_link_is_allowed_when_the_title_has_one() -> None:
    with_link = tip_request("Read https://example.org")
    fixture = GeneratorFixture("Read https://example.org today.")
    assert (await fixture.generate(with_link)).model == "m-1"


async def test_model_is_skipped_after_consecutive_failures_until_the_pause_is_over() -> None:
    fixture = GeneratorFixture(ModelFailed("timeout", "silent"))
    reasons = await fixture.reasons(SKIP_AFTER + 2)
    assert reasons == ["timeout"] * SKIP_AFTER + ["circuit open"] * 2
    assert fixture.writer.calls == fixture.timed == SKIP_AFTER
    fixture.clock.advance(int(SKIP_S * 1000) - 1)
    assert (await fixture.generate()).fallback_reason == "circuit open"
    fixture.clock.advance(1)
    reasons = await fixture.reasons(2)
    assert reasons == ["timeout", "circuit open"]  # one more failure begins the next pause
    fixture.writer.outcome = "Well again."
    fixture.clock.advance(int(SKIP_S * 1000))
    assert (await fixture.generate()).text == "Well again."
    fixture.writer.outcome = ModelFailed("timeout", "silent")
    reasons = await fixture.reasons(SKIP_AFTER)
    assert reasons == ["timeout"] * SKIP_AFTER


async def test_failures_with_a_success_between_them_do_not_skip_the_model() -> None:
    fixture = GeneratorFixture()
    for number in range(3 * SKIP_AFTER):
        fixture.writer.outcome = ModelFailed("timeout", "silent") if number % SKIP_AFTER else "A tip."
        assert (await fixture.generate()).fallback_reason != "circuit open"


@pytest.mark.parametrize(
    ("retry_after_s", "skipped_s"), [(None, SKIP_S), (1.0, SKIP_S), (30.0, 30.0), (3600.0, LONGEST_SKIP_S)]
)
async def test_pause_is_the_retry_after_within_limits(retry_after_s: float | None, skipped_s: float) -> None:
    fixture = GeneratorFixture(ModelFailed("rate limited", "429", pause_s=retry_after_s))
    await fixture.reasons(SKIP_AFTER)
    fixture.clock.advance(int(skipped_s * 1000) - 1)
    assert (await fixture.generate()).fallback_reason == "circuit open"
    fixture.clock.advance(1)
    assert (await fixture.generate()).fallback_reason == "rate limited"


async def test_call_from_before_a_pause_does_not_shorten_it() -> None:
    fixture = GeneratorFixture(ModelFailed("rate limited", "429", pause_s=30.0))
    (early,) = await fixture.pending()
    fixture.writer.gate.set()
    await fixture.reasons(SKIP_AFTER)
    fixture.writer.outcome = ModelFailed("timeout", "silent")
    assert (await early).fallback_reason == "timeout"
    fixture.clock.advance(29_999)
    assert (await fixture.generate()).fallback_reason == "circuit open"


async def test_concurrent_calls_are_limited() -> None:
    fixture = GeneratorFixture(at_once=2)
    waiting = await fixture.pending(calls=2)
    for _ in range(2 * SKIP_AFTER):
        assert await fixture.generate() == from_template("busy")
    fixture.writer.gate.set()
    assert [tip.model for tip in await asyncio.gather(*waiting)] == ["m-1", "m-1"]
    assert (await fixture.generate()).model == "m-1"
    assert fixture.writer.calls == 3


async def test_pending_calls_end_when_the_process_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.generation.generator.STOPPING_S", 0.02)
    fixture = GeneratorFixture()
    (waiting,) = await fixture.pending()
    fixture.tips.stop()
    assert await fixture.generate() == from_template("stopping")
    assert not waiting.done()
    assert await waiting == from_template("stopping")
    assert fixture.writer.calls == 1


async def test_answer_during_the_stop_is_used() -> None:
    fixture = GeneratorFixture()
    (waiting,) = await fixture.pending()
    fixture.tips.stop()
    fixture.writer.gate.set()
    assert (await waiting).model == "m-1"


async def test_timeout_of_a_writer_is_a_defect_unless_the_process_stops() -> None:
    assert (await GeneratorFixture(TimeoutError()).generate()).fallback_reason == "internal error"


async def test_cancelled_request_frees_its_call() -> None:
    fixture = GeneratorFixture(ModelFailed("timeout", "silent"), at_once=1)
    await fixture.reasons(SKIP_AFTER)
    fixture.clock.advance(int(SKIP_S * 1000))
    (trial,) = await fixture.pending()
    trial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trial
    fixture.writer.gate.set()
    fixture.writer.outcome = "A tip."
    assert (await fixture.generate()).model == "m-1"
