"""The profile of a decision equals a computation from the events that it saw, and the audit finds one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from app.bandit.decisions import Decision, Origin, ScoringRequest
from app.bandit.model.inputs import Context
from app.features.clock import DAY_MS, rfc3339
from app.features.events import TipEvent
from app.features.registry import Registry
from app.profiles.consistency import decisions
from app.profiles.consistency.decisions import DecisionCheck, DecisionMonitor
from tests.support import reference
from tests.support.clock import NOW_MS
from tests.support.entries import entry
from tests.support.events import admitted, feedback, served
from tests.support.logs import Recorder
from tests.support.registry import REGISTRY
from tests.support.retention import night
from tests.support.score_requests import tip
from tests.support.service import NEAR_AFTER, PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

VOLUME = "tip_volume_30d"
RATE = "completion_rate_30d"
MONTH_MS = 30 * DAY_MS
MINUTE_MS = 60_000
TIPS = (tip("tip-0", True, 1.0, 1.0), tip("tip-1", False, 2.0, 0.0))


async def score(service: PausableService, user_id: str = "ann", origin: Origin = "service") -> Decision:
    request = ScoringRequest(user_id=user_id, candidates=TIPS, context=Context(None), origin=origin)
    return await service.inner.bandit.scorer.score(request)


async def audited(service: PausableService, limit: int = 10_000) -> list[DecisionCheck]:
    """Check the newest decisions; returns the results, oldest decision first."""
    newest = await service.inner.logged_profiles.newest(limit)
    return (await service.inner.decision_checker.check(newest))[::-1]


async def outcomes(service: PausableService) -> list[str]:
    return [check.outcome for check in await audited(service)]


async def tamper(service: PausableService, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the stored read of every decision."""

    def work(connection: Any) -> None:
        for number, stored in connection.execute("SELECT number, profile_read FROM tip_scores").fetchall():
            change(read := json.loads(stored))
            connection.execute("UPDATE tip_scores SET profile_read = ? WHERE number = ?", (json.dumps(read), number))

    await service.database.write(work, of=())


# --- what is logged is true


async def random_step(
    random: Random, service: PausableService, user: str, sent: list[TipEvent], edges: list[int]
) -> None:
    """Send an event near an edge of the window, read, rebuild, or move the clock: to an edge, forwards or back."""
    clock = service.clock
    now_ms = clock.now_ms()
    kind = random.choices(["event", "read", "drain", "rebuild", "clock"], [4, 4, 4, 1, 6])[0]
    if kind == "event":
        age_ms = random.choice([0, 1, DAY_MS, MONTH_MS - 1, MONTH_MS - random.randint(1, 50), MONTH_MS + 1])
        action = random.choice(["completed", "completed", "dismissed", "snoozed"])
        event: TipEvent = served(user, now_ms - age_ms)
        if random.random() < 0.6:
            event = feedback(user, now_ms - age_ms, action, dwell_ms=random.randint(1, 9_000), offset_min=120)
        await service.send(event)
        sent.append(event)
        edges.append(now_ms - age_ms + MONTH_MS)
    elif kind == "read":
        await service.plain(user)
    elif kind == "drain":
        await service.drain()
    elif kind == "rebuild":
        await service.rebuild(user)
    else:
        ahead = sorted(edge - now_ms for edge in edges if edge >= now_ms) or [1]
        step_ms = random.choice(
            [1, 500, MINUTE_MS, 61 * MINUTE_MS, ahead[0], ahead[0] - 1, ahead[0] + 1, -500, -2_000, -3 * MINUTE_MS]
        )
        clock.step_to(now_ms + step_ms)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
async def test_logged_profiles_equal_the_reference_when_events_and_time_go_on(group: ServiceGroup, seed: int) -> None:
    random, services = Random(seed), [await group.open(), await group.open()]
    sent: list[TipEvent] = []
    edges: list[int] = []
    made: list[Decision] = []
    for _ in range(120):
        service, user = random.choice(services), random.choice(["ann", "bob"])
        await random_step(random, service, user, sent, edges)
        if random.random() < 0.6:
            made.append(await score(service, user))
    facts = list(enumerate(map(admitted, sent), start=1))
    for decision in made:
        assert decision.profile_read is not None
        assert decision.profile is not None
        assert decision.profile_read.values.keys() == set(REGISTRY.names)
        for name, (_, version) in decision.profile_read.values.items():
            seen = [fact for seq, fact in facts if seq <= version]
            expected = reference.profile(seen, decision.user_id, decision.profile_read.at_ms, live=True)
            assert decision.profile[name] == expected[name], f"{name} of {decision.id}"
    checks = await audited(services[0])
    assert [check.decision.decision_id for check in checks] == [decision.id for decision in made]
    assert {outcome for check in checks for outcome in check.values.values()} == {"consistent"}


async def test_cold_cached_and_local_reads_record_the_same_versions(service: PausableService) -> None:
    await service.send(served("ann"), feedback("ann"))
    reads = []
    for _ in range(NEAR_AFTER + 1):
        service.clock.advance(10)
        reads.append((await score(service)).profile_read)
        await service.drain()
    assert service.counted("near_hits") == (len(REGISTRY) if service.caches_locally else 0)
    assert [read.at_ms if read else None for read in reads] == [NOW_MS + 10 * place for place in (1, 2, 3, 4)]
    assert {tuple(value.version for value in read.values.values()) for read in reads if read} == {(2,) * len(REGISTRY)}
    await service.send(served("ann"))
    read = (await score(service)).profile_read
    assert read is not None
    assert {name: value.version for name, value in read.values.items()} == {
        **dict.fromkeys(REGISTRY.names, 2),
        VOLUME: 3,
    }
    assert await outcomes(service) == ["consistent"] * (NEAR_AFTER + 2)


async def test_moment_is_before_the_expiry_when_a_value_expires_after_its_read(
    service: PausableService, group: ServiceGroup
) -> None:
    await service.send(served("ann", NOW_MS - MONTH_MS + 1_000))
    scoring = await group.stopped_at(service.source.after, score(service))
    service.clock.advance(60_000)
    service.go()
    decision = await scoring
    assert decision.profile_read is not None
    assert ((decision.profile or {})[VOLUME], decision.profile_read.at_ms) == (1, NOW_MS + 999)
    assert ((await score(service)).profile or {})[VOLUME] == 0
    assert await outcomes(service) == ["consistent"] * 2


async def test_profile_is_computed_at_once_when_its_values_share_no_moment(
    service: PausableService, group: ServiceGroup
) -> None:
    await service.send(served("ann", NOW_MS - MONTH_MS + 1_000))
    await service.features("ann")
    await service.drain()
    await service.send(feedback("ann"))
    service.clock.advance(999)
    # 1. The cache has the volume, and not the rates; 2. the volume expires; 3. the rates are computed.
    scoring = await group.stopped_at(service.cache.before_lease, score(service))
    service.clock.advance(5)
    service.go()
    decision = await scoring
    assert decision.profile_read is not None
    assert ((decision.profile or {})[VOLUME], decision.profile_read.at_ms) == (0, NOW_MS + 1_004)
    assert await outcomes(service) == ["consistent"]


async def test_features_read_as_null_have_no_version_when_disabled(service: PausableService) -> None:
    await service.send(served("ann"), feedback("ann"))
    await service.switch(VOLUME, on=False)
    for _ in range(NEAR_AFTER + 1):
        decision = await score(service)
        await service.drain()
        assert (decision.profile or {})[VOLUME] is None
        assert decision.profile_read is not None
        assert decision.profile_read.values.keys() == set(REGISTRY.names) - {VOLUME}
    assert service.counted("near_hits") == (len(REGISTRY) - 1 if service.caches_locally else 0)
    await service.switch(VOLUME, on=True)
    assert await outcomes(service) == ["consistent"] * (NEAR_AFTER + 1)


# --- what is wrong is found


async def log_volume(service: PausableService, logged: str) -> None:
    """Change the logged value of `tip_volume_30d`, which is 1, in every decision."""
    statement = "UPDATE tip_scores SET request = REPLACE(request, :old, :new)"
    changed = {"old": f'"{VOLUME}":1', "new": f'"{VOLUME}":{logged}'}
    assert await service.database.execute(statement, changed) > 0


async def test_violation_is_found_when_a_logged_value_is_changed(service: PausableService) -> None:
    await service.send(served("ann"), feedback("ann"))
    decision = await score(service)
    await log_volume(service, "7")
    (check,) = await audited(service)
    assert (check.decision.decision_id, check.outcome) == (decision.id, "violation")
    assert [(item["feature"], item["version"], item["logged"], item["computed"]) for item in check.wrong] == [
        (VOLUME, 2, "7", "1")
    ]
    assert check.values == {**dict.fromkeys(REGISTRY.names, "consistent"), VOLUME: "violation"}


async def test_violation_is_found_when_an_integer_is_logged_as_a_float(service: PausableService) -> None:
    await service.send(served("ann"))
    await score(service)
    await log_volume(service, "1.0")
    assert await outcomes(service) == ["violation"]


async def test_decision_is_checked_when_another_one_has_logged_nul(service: PausableService) -> None:
    """PostgreSQL stores it in JSON, but does not decode it."""
    await service.send(served("ann"))
    await score(service)
    await service.database.execute(
        "UPDATE tip_scores SET request = REPLACE(request, 'null', :nul)", {"nul": '"\\u0000"'}
    )
    assert len(await service.inner.logged_profiles.newest(10)) == 1


@pytest.mark.parametrize("by", [-1, 1])
async def test_violation_is_found_when_a_version_is_wrong(service: PausableService, by: int) -> None:
    await service.send(served("ann"))
    await score(service)
    await service.send(served("ann"))

    def change(read: dict[str, Any]) -> None:
        read["values"][VOLUME][1] += by

    await tamper(service, change)
    (check,) = await audited(service)
    assert [(item["feature"], item["logged"], item["computed"]) for item in check.wrong] == [(VOLUME, "1", f"{1 + by}")]


async def test_violation_is_found_when_the_moment_is_late(service: PausableService) -> None:
    await service.send(served("ann", NOW_MS - MONTH_MS + 1))
    await score(service)
    await tamper(service, lambda read: read.update(at_ms=NOW_MS + 1))
    assert await outcomes(service) == ["violation"]


# --- what cannot be compared is skipped, with the reason


async def test_profile_is_skipped_when_the_service_did_not_read_it(service: PausableService) -> None:
    await score(service, origin="request")
    await score(service, origin="absent")
    await service.switch(REGISTRY.names[0], on=False)
    for name in REGISTRY.names[1:]:
        await service.switch(name, on=False)
    await score(service)
    assert await outcomes(service) == ["not read"] * 3


async def test_profile_is_skipped_when_no_read_is_recorded(service: PausableService) -> None:
    await score(service)
    await service.database.execute("UPDATE tip_scores SET profile_read = NULL", ())
    assert await outcomes(service) == ["not recorded"]


async def test_value_is_skipped_when_its_window_is_pruned(service: PausableService) -> None:
    await service.send(served("ann", NOW_MS - MONTH_MS + 2), served("bob", NOW_MS - MONTH_MS))
    await score(service)
    retention = service.inner.retention
    service.clock.step_to(NOW_MS + 150 * DAY_MS + 1)  # events are kept for 180 days
    assert await night(retention, confirmed=True) == {
        "events": 1,
        "decisions": 0,
    }
    assert await outcomes(service) == ["pruned"]


async def test_value_is_compared_when_no_event_was_pruned(service: PausableService) -> None:
    await service.send(served("ann", NOW_MS - MONTH_MS + 2))
    await score(service)
    service.clock.step_to(NOW_MS + 150 * DAY_MS + 1)
    assert await night(service.inner.retention, confirmed=True) == {"events": 0, "decisions": 0}
    assert await outcomes(service) == ["consistent"]


async def test_pruned_value_stays_skipped_when_the_retention_becomes_longer(group: ServiceGroup) -> None:
    shorter = await group.open(retention_days=60)
    await shorter.send(served("ann", NOW_MS - 20 * DAY_MS), served("ann"))
    await score(shorter)
    group.clock.advance(50 * DAY_MS)
    assert await night(shorter.inner.retention, confirmed=True) == {"events": 1, "decisions": 0}
    longer = await group.open(retention_days=180)
    for _ in range(10):
        assert await night(longer.inner.retention) == {"events": 0, "decisions": 0}
        assert await outcomes(longer) == ["pruned"]


async def test_value_is_skipped_when_its_definition_has_changed(service: PausableService, group: ServiceGroup) -> None:
    await service.send(served("ann"))
    await score(service)
    changed = [entry(name=VOLUME) if item.name == VOLUME else item for item in REGISTRY if item.name != RATE]
    (check,) = await audited(await group.open(Registry(changed)))
    assert check.outcome == "consistent"
    skipped = {name for name, outcome in check.values.items() if outcome == "other definition"}
    assert skipped == {VOLUME, RATE}


async def test_value_is_skipped_when_it_cannot_be_computed_now(service: PausableService) -> None:
    await score(service)
    await service.switch(VOLUME, on=False)
    (check,) = await audited(service)
    assert (check.outcome, check.values[VOLUME]) == ("consistent", "not computed")


async def test_profile_is_skipped_when_the_events_of_the_user_are_deleted(service: PausableService) -> None:
    await service.send(served("ann"))
    await score(service)
    (logged,) = await service.inner.logged_profiles.newest(1)
    await service.erase("ann")
    checker = service.inner.decision_checker
    assert [check.outcome for check in await checker.check([logged])] == ["events deleted"]
    await service.send(served("bob"), served("ann"), served("ann"))
    assert [check.outcome for check in await checker.check([logged])] == ["events deleted"]


async def test_profile_without_events_is_compared_when_another_user_was_erased(service: PausableService) -> None:
    await score(service, "bob")
    await service.send(served("ann"))
    await service.erase("ann")
    assert await outcomes(service) == ["consistent"]


# --- the running audit


async def test_monitor_checks_a_sample_of_new_decisions(
    service: PausableService, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(decisions, "log", recorder)
    monitor = DecisionMonitor(service.inner.decision_checker, 3, Random(1))

    def counted(outcome: str) -> float:
        return service.counted("decision_checks", outcome=outcome)

    await score(service)
    await monitor.round()  # what was there before is not checked
    for _ in range(5):
        await score(service)
    await monitor.round()
    assert counted("consistent") == 3
    await monitor.round()
    assert counted("consistent") == 3
    await service.send(served("ann"))
    decision = await score(service)
    await log_volume(service, "7")
    await monitor.round()
    assert (counted("consistent"), counted("violation")) == (3, 1)
    (line,) = recorder.of("decision_violation")
    assert (line["decision_id"], line["feature"], line["version"]) == (decision.id, VOLUME, 1)
    assert (line["logged"], line["computed"], line["read_at"]) == ("7", "1", rfc3339(NOW_MS))
