"""The finding that a model keeps failing: why, and since when."""

import pytest

from app.operations.findings import RECENT_MS, failing_model
from app.operations.samples import Sample
from tests.support.clock import NOW_MS
from tests.support.samples import sample

# Half a minute before a minute ends.
AT_MS = NOW_MS - NOW_MS % 60_000 + 30_000


def asked(minutes_ago: float, process: str = "one", **outcomes: int) -> Sample:
    """The outcomes of tips so long ago; `_` stands for a space."""
    counts = {f"generations_{name.replace('_', ' ')}": count for name, count in outcomes.items()}
    return sample(at_ms=AT_MS - round(minutes_ago * 60_000), process=process, counts=counts)


def said(*samples: Sample) -> str:
    found = failing_model(samples, AT_MS)
    assert all((item.state, item.subject) == ("degraded", "model") and item.advice for item in found)
    return " ".join(item.text for item in found)


def test_finding_has_its_causes_and_the_time_of_the_last_success() -> None:
    text = said(
        asked(20, model=40),
        asked(14, timeout=3),
        asked(3, circuit_open=30, process="two"),
        asked(1, model=8),
        asked(0, circuit_open=8, refused=1),
    )
    minute = (AT_MS - 60_000) // 60_000 % 1_440
    assert text == (
        "The language model failed for 42 tips in the last 15 minutes: timeout (3), refused (1), circuit open (38). "
        f"It last wrote one at {minute // 60:02d}:{minute % 60:02d} UTC."
    )


def test_model_that_is_seldom_asked_is_found() -> None:
    assert "for 3 tips" in said(asked(12, timeout=1), asked(7, timeout=1), asked(2, timeout=1))


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [asked(2, template=50), asked(1, template=9)],
        [asked(2, timeout=2)],
        [asked(2, timeout=9), asked(0, model=9)],
        [asked(2, timeout=5, model=5), asked(1, timeout=4, model=5), asked(0, timeout=1, model=30)],
        [asked(1, stopping=16)],
        [asked(RECENT_MS / 60_000 + 1, timeout=9)],
    ],
    ids=["no requests", "no model is set", "too few", "well again", "some of many", "a process that ends", "long ago"],
)
def test_there_is_no_finding_when_the_model_does_not_keep_failing(samples: list[Sample]) -> None:
    assert said(*samples) == ""


def test_majority_decides_over_all_processes() -> None:
    assert said(asked(1, model=6), asked(1, process="two", timeout=5)) == ""
    assert said(asked(1, model=4), asked(1, process="two", timeout=5)) != ""
