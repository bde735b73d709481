"""The overview: states, figures and findings from samples and the own view of the process."""

from datetime import datetime
from typing import Any

import pytest

from app.features.clock import HOUR_MS, rfc3339, to_ms
from app.operations.component_states import COMPONENTS, OK, ComponentStatus
from app.operations.component_states import ComponentView as View
from app.operations.figures import SLOT_MS
from app.operations.overview import ALIVE_MS, CURRENT_MS, Overview, build_overview
from app.operations.samples import SUMMARY_MS, Gauges, Record, Sample
from tests.support.clock import NOW_MS
from tests.support.samples import sample

WELL = dict.fromkeys(COMPONENTS, OK)
STANDINGS = {name: ComponentStatus(name, "ok", "", NOW_MS - 900_000, NOW_MS - 5_000) for name in COMPONENTS}
AWAY = {**WELL, "cache": View("down", "away")}


def seen(*samples: Sample, **changes: Any) -> Overview:
    """The overview of samples while all components are ok; `changes` replace arguments."""
    live = changes.pop("live", WELL)
    process, gauges = changes.pop("process", "one"), changes.pop("gauges", Gauges())
    own = sample(process=process, seconds=0.0, gauges=gauges, components=live) if live is not None else None
    arguments = {"record": Record([*samples], STANDINGS), "own": own, "now_ms": NOW_MS, **changes}
    return build_overview(**arguments)


def state_of(found: Overview, name: str) -> tuple[str, str, int]:
    (item,) = (item for item in found.components if item.name == name)
    since_ms = to_ms(datetime.fromisoformat(item.since))
    return item.state, item.detail, (NOW_MS - since_ms) // 1000


def test_overview_is_ok_when_all_components_are() -> None:
    found = seen(sample(components=WELL, gauges=Gauges(dead_letters=0, outbox_age_s=0.0)))
    assert (found.state, found.findings) == ("ok", [])
    assert found.verdict.startswith("Everything works")
    assert state_of(found, "cache") == ("ok", "", 900)
    assert [item.name for item in found.components] == list(COMPONENTS)


def test_figures_are_empty_when_there_is_no_sample() -> None:
    found = seen(record=Record([], {}))
    assert not found.sampled
    for figure in found.figures.values():
        assert (figure.now, figure.hour) == (None, None)
        assert figure.series == [None] * 60
    assert state_of(found, "cache") == ("ok", "", 0)
    assert found.state == "ok"
    assert "no figures yet" in found.verdict


def test_gauges_are_the_current_ones() -> None:
    waiting = sample(at_ms=NOW_MS - 5_000, gauges=Gauges(dead_letters=2, owed=1))
    assert [item.subject for item in seen(waiting).findings] == ["dead_letters"]
    found = seen(waiting, gauges=Gauges(dead_letters=0))
    assert found.findings == []
    assert (found.figures["dead_letters"].now, found.figures["dead_letters"].hour) == (0, 2)
    assert found.figures["dead_letters"].series[-1] == 0
    assert found.figures["owed"].now == 1
    assert [item.last_seen for item in found.processes] == [rfc3339(NOW_MS - 5_000)]


def test_current_state_replaces_the_stored_one() -> None:
    found = seen(sample(components=WELL), live=AWAY)
    assert state_of(found, "cache") == ("down", "away", 0)
    assert found.state == "degraded"
    (finding,) = found.findings
    assert (finding.subject, finding.text) == ("cache", "The cache is down: away.")
    assert finding.advice


def test_recent_state_of_another_process_counts() -> None:
    other = sample(process="two", role="worker", components=AWAY, at_ms=NOW_MS - CURRENT_MS)
    assert state_of(seen(other), "cache") == ("down", "away (reported by worker two)", 0)
    assert state_of(seen(other, process="two"), "cache")[0] == "ok"
    old = sample(process="two", components=AWAY, at_ms=NOW_MS - CURRENT_MS - 1)
    assert state_of(seen(old), "cache")[0] == "ok"
    ended = sample(process="two", at_ms=NOW_MS - 1, stopped=True)
    assert state_of(seen(other, ended), "cache")[0] == "ok"


def test_stored_states_count_when_the_own_view_is_missing() -> None:
    assert state_of(seen(live=None), "queue") == ("ok", "", 900)
    found = seen(live=None, record=Record([], {}))
    assert {item.state for item in found.components} == {"unknown"}
    assert found.state == "unknown"


def test_overview_is_down_when_reads_cannot_be_served() -> None:
    away = {**WELL, "queue": View("down", "away"), "worker": View("unknown", "?"), "service": View("degraded", "")}
    assert seen(live=away).state == "degraded"
    assert [item.subject for item in seen(live=away).findings] == ["queue"]
    gone = {**WELL, "database": View("down", "gone"), "service": View("down", "it cannot serve reads")}
    found = seen(live=gone, record=Record([], {}))
    assert found.state == "down"
    assert found.verdict.startswith("Reads cannot be served")


def test_figures_add_up_all_processes() -> None:
    minute = range(NOW_MS, NOW_MS - 60_000, -10_000)
    found = seen(
        *(sample(at_ms=at_ms, counts={"requests_2xx": 50}) for at_ms in minute),
        *(sample(process="two", at_ms=at_ms, counts={"requests_2xx": 40, "requests_5xx": 10}) for at_ms in minute),
        sample(at_ms=NOW_MS - 600_000, counts={"hits": 1, "misses": 1, "latency_0.5": 1}, gauges=Gauges(queue_depth=9)),
        sample(counts={"hits": 3, "misses": 1, "latency_0.001": 3}, gauges=Gauges(queue_depth=2), seconds=0.0),
    ).figures
    assert found["request_rate"].now == pytest.approx(10)
    assert found["failed_requests"].now == 60
    assert found["hit_ratio"].now == 0.75
    assert found["hit_ratio"].hour == pytest.approx(4 / 6)
    assert (found["queue_depth"].now, found["queue_depth"].hour) == (2, 9)
    assert found["latency_p50_ms"].now == pytest.approx(0.75)
    assert found["latency_p99_ms"].hour == pytest.approx(490)


def test_series_has_a_gap_when_samples_are_missing() -> None:
    start = NOW_MS - NOW_MS % SLOT_MS
    found = seen(
        sample(at_ms=start, counts={"fills_refused": 2}),
        sample(at_ms=start - SLOT_MS),
        sample(at_ms=start - 3 * SLOT_MS, counts={"fills_refused": 1}),
        sample(at_ms=NOW_MS - HOUR_MS - 2 * SLOT_MS, counts={"fills_refused": 9}),
    )
    assert found.figures["fills_refused"].series[-4:] == [1, None, 0, 2]
    assert found.figures["fills_refused"].series[:-4] == [None] * (60 - 4)
    assert found.figures["hit_ratio"].series == [None] * 60
    assert (found.slots[-1], len(found.slots)) == (rfc3339(start), 60)


def test_request_figures_are_unknown_when_only_a_worker_runs() -> None:
    found = seen(sample(role="worker")).figures
    assert found["request_rate"].now is None
    assert found["fills_refused"].now == 0


@pytest.mark.parametrize(
    ("subject", "changes", "text"),
    [
        ("failed_requests", {"counts": {"requests_5xx": 1}}, "1 request failed (5xx) in the last minute."),
        ("shed", {"counts": {"requests_5xx": 7, "shed": 7}}, "7 requests were shed"),
        ("degraded_reads", {"counts": {"degraded_reads": 1234}}, "1,234 reads were computed without the cache"),
        ("latency_p99_ms", {"counts": {"latency_0.5": 100}}, "over 498 ms"),
        ("lag_p99_ms", {"counts": {"lag_2.5": 100}}, "over 2,485 ms"),
        ("outbox_age_s", {"gauges": Gauges(outbox_age_s=61.0)}, "has waited 61 s"),
        ("dead_letters", {"gauges": Gauges(dead_letters=2)}, "2 dead letters wait"),
        ("events_ahead", {"gauges": Gauges(events_ahead=1)}, "1 event lies more than five minutes in the future."),
        ("unreadable", {"gauges": Gauges(unreadable=1)}, "The learned state of 1 user is damaged"),
        ("feature_errors", {"counts": {"feature_errors": 3}, "at_ms": NOW_MS - 1_800_000}, "3 feature values"),
        ("stale_dropped", {"counts": {"stale_dropped": 1}, "at_ms": NOW_MS - 1_800_000}, "held 1 value older than"),
        (
            "decision_checks_violation",
            {"counts": {"decision_checks_violation": 2, "decision_checks_consistent": 2}, "at_ms": NOW_MS - 1_800_000},
            "found 2 decisions with a wrong profile",
        ),
        ("untrue", {"counts": {"untrue": 1}, "at_ms": NOW_MS - 1_800_000}, "found 1 wrong value"),
    ],
)
def test_figure_above_its_limit_is_a_finding(subject: str, changes: dict[str, Any], text: str) -> None:
    (found,) = seen(sample(**changes)).findings
    assert (found.subject, found.state) == (subject, "degraded")
    assert text in found.text
    assert found.advice


def test_processes_with_different_registries_are_named() -> None:
    one, two = sample(registry="1a"), sample(process="two", registry="1a")
    other = sample(process="w", role="worker", registry="2b")
    found = seen(other, two, one)
    (finding,) = found.findings
    assert (finding.subject, finding.state) == ("registry", "degraded")
    assert finding.text.endswith(": 1a by API process one, API process two; 2b by worker w.")
    assert "PROFILES_FEATURES" in finding.advice
    assert [item.registry for item in found.processes] == ["1a", "1a", "2b"]


def test_registries_of_stopped_processes_are_ignored() -> None:
    said, unsaid = sample(registry="1a"), sample(process="two")
    ended = sample(process="three", registry="2b", stopped=True)
    old = sample(process="four", registry="2b", at_ms=NOW_MS - ALIVE_MS - 1)
    assert seen(old, said, unsaid, ended).findings == []
    renewed = sample(process="three", registry="1a")
    assert seen(sample(process="three", registry="2b", at_ms=NOW_MS - 1), said, renewed).findings == []


def test_failing_features_are_a_finding() -> None:
    failing = {**WELL, "features": View("degraded", "failing: probe")}
    (finding,) = seen(sample(components=WELL), live=failing).findings
    assert (finding.subject, finding.text) == ("features", "The features are degraded: failing: probe.")


def test_worst_finding_comes_first() -> None:
    found = seen(sample(gauges=Gauges(dead_letters=1)), live=AWAY)
    assert [item.subject for item in found.findings] == ["cache", "dead_letters"]
    assert "2 findings" in found.verdict


def test_processes_are_those_with_recent_samples() -> None:
    found = seen(
        sample(at_ms=NOW_MS - 5_000),
        sample(at_ms=NOW_MS - 15_000),
        sample(process="w", role="worker", at_ms=NOW_MS - 29_000),
        sample(process="dead", at_ms=NOW_MS - 31_000),
        sample(process="ended", at_ms=NOW_MS - 1_000, stopped=True),
    )
    assert [(item.role, item.process, item.stopped) for item in found.processes] == [
        ("api", "ended", True),
        ("api", "one", False),
        ("worker", "w", False),
    ]


def test_samples_of_the_future_are_ignored() -> None:
    ahead = sample(process="two", at_ms=NOW_MS + 600_000, components=AWAY, counts={"requests_5xx": 9})
    found = seen(sample(counts={"requests_2xx": 5}), ahead)
    assert [item.process for item in found.processes] == ["one"]
    assert (found.state, found.figures["failed_requests"].now) == ("ok", 0)
    assert not seen(ahead).sampled


def test_share_of_consistent_checks_ignores_undecided_ones() -> None:
    counts = {"checks_consistent": 3, "checks_violation": 1, "checks_empty": 50, "checks_unchecked": 7}
    assert seen(sample(counts=counts)).figures["consistent"].now == 0.75
    assert seen(sample(counts={"checks_empty": 50})).figures["consistent"].now is None
    counts = {"decision_checks_consistent": 1, "decision_checks_violation": 3, "decision_checks_not read": 9}
    assert seen(sample(counts=counts)).figures["decisions_consistent"].now == 0.25


def test_series_covers_a_longer_period_when_asked() -> None:
    half_hours = [NOW_MS - number * SUMMARY_MS for number in range(60, 0, -1)]
    past = [sample(at_ms=at_ms, seconds=1_800.0, counts={"shed": 2}, gauges=Gauges(owed=3)) for at_ms in half_hours]
    recent = sample(counts={"shed": 1}, gauges=Gauges(owed=0))
    found = seen(recent, history=("day", [*past, recent]))
    assert (found.period, found.slot_s, len(found.slots)) == ("day", 1_800, 48)
    assert found.figures["shed"].series == [2.0] * 47 + [1.0]
    assert found.figures["owed"].series == [3] * 47 + [0]
    assert (found.figures["shed"].now, found.figures["shed"].hour) == (1, 1)
    found = seen(recent, history=("month", [*past, recent]))
    assert (found.slot_s, len(found.slots)) == (12 * 3_600, 60)
    assert sum(filter(None, found.figures["shed"].series)) == 2 * 60 + 1
    assert found.figures["shed"].series[:50] == [None] * 50
