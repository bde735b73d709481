"""The last 30 days of a user: the counts of days and hours equal each other and the features."""

from datetime import datetime
from itertools import pairwise

from app.features.clock import DAY_MS
from app.features.events import TipEvent
from tests.integration.api.admin.test_user_inspection import look
from tests.support.events import feedback, served
from tests.support.live import Live, new_user
from tests.support.registry import REGISTRY

KINDS = ("served", "completed", "dismissed", "snoozed")


async def test_counts_equal_the_features(site: Live) -> None:
    user, now = new_user(), site.now_ms
    sent: list[TipEvent] = [
        *(served(user, now - ago * DAY_MS - 1_000) for ago in (0, 0, 1, 29, 30, 60)),
        *(feedback(user, now - ago * DAY_MS - 900) for ago in (0, 29, 30)),
        feedback(user, now - 2 * DAY_MS, "dismissed"),
        feedback(user, now - 2 * DAY_MS, "snoozed", offset_min=330),
    ]
    await site.send(*sent)
    body = await look(site, user, "/development")
    assert body.keys() == {"user_id", "at", "days", "hours", "features"}
    days, hours = body["days"], body["hours"]
    assert [len(days), len(hours)] == [30, 24]
    assert [hour["hour"] for hour in hours] == list(range(24))
    totals = {kind: sum(day[kind] for day in days) for kind in KINDS}
    assert totals == {"served": 4, "completed": 2, "dismissed": 1, "snoozed": 1}
    assert totals == {kind: sum(hour[kind] for hour in hours) for kind in KINDS}
    assert (days[-1]["served"], days[-2]["served"], days[0]["served"]) == (2, 1, 1)
    assert days[-1]["end"] == body["at"]
    assert all(before["end"] == after["start"] for before, after in pairwise(days))
    (snoozed,) = (hour["hour"] for hour in hours if hour["snoozed"])
    (dismissed,) = (hour["hour"] for hour in hours if hour["dismissed"])
    assert (snoozed - dismissed) % 24 in (5, 6)  # five and a half hours to the east
    live = await site.features(user)
    assert totals["served"] == live["tip_volume_30d"]
    assert body["features"].keys() == live.keys()
    for name, value in live.items():
        assert body["features"][name][-1] == {"at": body["at"], "value": value, "known": True}


async def test_features_have_a_point_a_day(site: Live) -> None:
    user, now = new_user(), site.now_ms
    await site.send(served(user, now - 5 * DAY_MS), feedback(user, now - 3 * DAY_MS))
    features = (await look(site, user, "/development"))["features"]
    assert features.keys() == set(REGISTRY.names)
    points = features["tip_volume_30d"]
    assert [point["value"] for point in points] == [0] * 24 + [1] * 6
    moments = [datetime.fromisoformat(point["at"]) for point in points]
    assert {(after - before).total_seconds() for before, after in pairwise(moments)} == {86_400.0}
    assert [point["value"] for point in features["completion_rate_30d"]] == [None] * 26 + [1.0] * 4


async def test_timeline_is_empty_when_the_user_is_unknown(site: Live) -> None:
    body = await look(site, new_user(), "/development")
    assert sum(day[kind] for day in body["days"] for kind in KINDS) == 0
    assert {point["value"] for point in body["features"]["tip_volume_30d"]} == {0}
