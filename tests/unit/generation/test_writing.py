"""The service: a tip comes out of it whatever the model does, and it says why it was not the model's."""

from __future__ import annotations

import asyncio
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import FallbackReason, ModelFailed
from app.generation import writing
from app.generation.ports import Order
from app.generation.prompt import PROMPT_VERSION
from app.generation.template import worded
from app.generation.text_rules import problem_of
from app.generation.writing import LONGEST_SKIP_S, SKIP_AFTER, SKIP_S, Model, Writing, Written
from app.telemetry import Metrics
from tests.support.clock import FakeClock
from tests.support.tip_orders import order
from tests.support.waiting import eventually

ORDER = order()
TEMPLATE = worded(ORDER)


class Scripted:
    """A writer that does as it is told."""

    def __init__(self, outcome: str | Exception = "A tip.") -> None:
        self.outcome = outcome
        self.calls = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, order: Order) -> str:  # whatever it is
        """Implements `Writer`."""
        self.calls += 1
        await self.gate.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Bench:
    """A service with such a writer."""

    def __init__(self, outcome: str | Exception = "A tip.", at_once: int = 2) -> None:
        self.writer = Scripted(outcome)
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.writing = Writing(Model(self.writer, "m-1", at_once), self.clock, self.metrics)

    def counted(self, outcome: str) -> float:
        """How often a tip was worded so."""
        return self.metrics.collectors.get_sample_value("profiles_generations_total", {"outcome": outcome}) or 0.0

    @property
    def timed(self) -> float:
        """How many calls of the model were timed."""
        return self.metrics.collectors.get_sample_value("profiles_model_seconds_count") or 0.0


async def test_template_words_it_without_a_reason_when_there_is_no_model() -> None:
    metrics = Metrics()
    written = await Writing(None, FakeClock(), metrics).write(ORDER)
    assert written == Written(TEMPLATE, None, None, PROMPT_VERSION)
    assert metrics.collectors.get_sample_value("profiles_generations_total", {"outcome": "template"}) == 1


async def test_model_words_it_when_there_is_one() -> None:
    bench = Bench("  A tip\nof two lines. ")
    assert await bench.writing.write(ORDER) == Written("A tip of two lines.", "m-1", None)
    assert (bench.counted("model"), bench.timed) == (1, 1)


@pytest.mark.parametrize("reason", get_args(FallbackReason))
async def test_template_stands_in_and_says_why_when_the_model_fails(reason: FallbackReason) -> None:
    bench = Bench(ModelFailed(reason, "it did"))
    assert await bench.writing.write(ORDER) == Written(TEMPLATE, None, reason)
    assert (bench.counted(reason), bench.timed) == (1, 1)


async def test_template_stands_in_when_the_writer_has_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(KeyError("defect"))
    assert await bench.writing.write(ORDER) == Written(TEMPLATE, None, "internal error")
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " ", "…", "x" * 501, "a\x1bb", "see http://evil.example", "\U000e0041 x"])
async def test_text_is_refused_when_it_is_no_tip(text: str) -> None:
    bench = Bench(text)
    for _ in range(2 * SKIP_AFTER):  # and that is no reason to leave the endpoint alone
        assert await bench.writing.write(ORDER) == Written(TEMPLATE, None, "invalid answer")
    assert bench.writer.calls == 2 * SKIP_AFTER


@given(st.text())
async def test_whatever_a_model_says_a_tip_keeps_the_rules(text: str) -> None:
    written = await Bench(text).writing.write(ORDER)
    assert problem_of(written.text) is None


async def test_link_is_let_through_when_the_title_has_one() -> None:
    with_link = order("Read https://example.org")
    bench = Bench("Read https://example.org today.")
    assert (await bench.writing.write(with_link)).model == "m-1"


async def test_model_is_skipped_after_failures_in_a_row_until_the_pause_is_over() -> None:
    bench = Bench(ModelFailed("timeout", "silent"))
    reasons = [(await bench.writing.write(ORDER)).reason for _ in range(SKIP_AFTER + 2)]
    assert reasons == ["timeout"] * SKIP_AFTER + ["circuit open"] * 2
    assert bench.writer.calls == bench.timed == SKIP_AFTER
    bench.clock.advance(int(SKIP_S * 1000) - 1)
    assert (await bench.writing.write(ORDER)).reason == "circuit open"
    bench.clock.advance(1)
    reasons = [(await bench.writing.write(ORDER)).reason for _ in range(2)]
    assert reasons == ["timeout", "circuit open"]  # one more failure begins the next pause
    bench.writer.outcome = "Well again."
    bench.clock.advance(int(SKIP_S * 1000))
    assert (await bench.writing.write(ORDER)).text == "Well again."
    bench.writer.outcome = ModelFailed("timeout", "silent")
    reasons = [(await bench.writing.write(ORDER)).reason for _ in range(SKIP_AFTER)]
    assert reasons == ["timeout"] * SKIP_AFTER


async def test_failures_with_a_success_between_them_do_not_skip_the_model() -> None:
    bench = Bench()
    for number in range(3 * SKIP_AFTER):
        bench.writer.outcome = ModelFailed("timeout", "silent") if number % SKIP_AFTER else "A tip."
        assert (await bench.writing.write(ORDER)).reason != "circuit open"


@pytest.mark.parametrize(
    ("retry_after_s", "skipped_s"), [(None, SKIP_S), (1.0, SKIP_S), (30.0, 30.0), (3600.0, LONGEST_SKIP_S)]
)
async def test_model_is_skipped_for_as_long_as_it_asks_within_bounds(
    retry_after_s: float | None, skipped_s: float
) -> None:
    bench = Bench(ModelFailed("rate limited", "429", pause_s=retry_after_s))
    for _ in range(SKIP_AFTER):
        await bench.writing.write(ORDER)
    bench.clock.advance(int(skipped_s * 1000) - 1)
    assert (await bench.writing.write(ORDER)).reason == "circuit open"
    bench.clock.advance(1)
    assert (await bench.writing.write(ORDER)).reason == "rate limited"


async def test_call_from_before_a_pause_does_not_shorten_it() -> None:
    bench = Bench(ModelFailed("rate limited", "429", pause_s=30.0))
    bench.writer.gate.clear()
    early = asyncio.get_running_loop().create_task(bench.writing.write(ORDER))
    await eventually(lambda: bench.writer.calls == 1)
    bench.writer.gate.set()
    for _ in range(SKIP_AFTER):
        await bench.writing.write(ORDER)
    bench.writer.outcome = ModelFailed("timeout", "silent")
    assert (await early).reason == "timeout"
    bench.clock.advance(29_999)
    assert (await bench.writing.write(ORDER)).reason == "circuit open"


async def test_calls_do_not_pile_up_when_the_model_is_slow() -> None:
    bench = Bench(at_once=2)
    bench.writer.gate.clear()
    waiting = [asyncio.get_running_loop().create_task(bench.writing.write(ORDER)) for _ in range(2)]
    await eventually(lambda: bench.writer.calls == 2)
    for _ in range(2 * SKIP_AFTER):
        assert await bench.writing.write(ORDER) == Written(TEMPLATE, None, "busy")
    bench.writer.gate.set()
    assert [written.model for written in await asyncio.gather(*waiting)] == ["m-1", "m-1"]
    assert (await bench.writing.write(ORDER)).model == "m-1"
    assert bench.writer.calls == 3


async def test_answers_under_way_are_given_up_when_the_process_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "STOPPING_S", 0.02)
    bench = Bench()
    bench.writer.gate.clear()
    waiting = asyncio.get_running_loop().create_task(bench.writing.write(ORDER))
    await eventually(lambda: bench.writer.calls == 1)
    bench.writing.stop()
    assert await bench.writing.write(ORDER) == Written(TEMPLATE, None, "stopping")
    assert not waiting.done()
    assert await waiting == Written(TEMPLATE, None, "stopping")
    assert bench.writer.calls == 1


async def test_answer_that_comes_while_the_process_stops_is_taken() -> None:
    bench = Bench()
    bench.writer.gate.clear()
    waiting = asyncio.get_running_loop().create_task(bench.writing.write(ORDER))
    await eventually(lambda: bench.writer.calls == 1)
    bench.writing.stop()
    bench.writer.gate.set()
    assert (await waiting).model == "m-1"


async def test_time_that_is_over_in_a_writer_is_its_defect_while_nothing_stops() -> None:
    assert (await Bench(TimeoutError()).writing.write(ORDER)).reason == "internal error"


async def test_place_is_free_when_somebody_goes_away() -> None:
    bench = Bench(ModelFailed("timeout", "silent"), at_once=1)
    for _ in range(SKIP_AFTER):
        await bench.writing.write(ORDER)
    bench.clock.advance(int(SKIP_S * 1000))
    bench.writer.gate.clear()
    trial = asyncio.get_running_loop().create_task(bench.writing.write(ORDER))
    await eventually(lambda: bench.writer.calls == SKIP_AFTER + 1)
    trial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trial
    bench.writer.gate.set()
    bench.writer.outcome = "A tip."
    assert (await bench.writing.write(ORDER)).model == "m-1"
