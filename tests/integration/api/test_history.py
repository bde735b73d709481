"""`POST /profiles/history`: the training set."""

from __future__ import annotations

from typing import Any

from app.features.clock import DAY_MS, rfc3339
from tests.support.events import local_time, served
from tests.support.live import Live, assert_refused, new_user, paths, problem


async def rows(site: Live, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await site.json("/profiles/history", "POST", json=body)
    assert answer.keys() == {"rows"}
    found: list[dict[str, Any]] = answer["rows"]
    return found


async def test_history_has_each_row_at_its_moment_in_order(site: Live) -> None:
    ann, bob = new_user("ann"), new_user("bob")
    moment = site.now_ms - 2 * DAY_MS
    await site.send(served(ann, moment), served(ann, moment + 2), served(bob, moment + 1))
    asked = [(ann, moment + 2), (bob, moment), (ann, moment - 1), (ann, moment), (bob, moment + 1), (ann, moment + 2)]
    found = await rows(
        site,
        {"rows": [{"user_id": u, "as_of": rfc3339(at)} for u, at in asked], "features": ["tip_volume_30d"]},
    )
    assert found == [
        {"user_id": user, "as_of": rfc3339(at), "features": {"tip_volume_30d": count}}
        for (user, at), count in zip(asked, [2, 0, 0, 1, 1, 2], strict=True)
    ]


async def test_history_equals_the_online_read_when_the_moment_is_now(site: Live) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms - 5))
    (row,) = await rows(site, {"rows": [{"user_id": user, "as_of": rfc3339(site.now_ms)}]})
    assert row["features"] == await site.features(user)


async def test_history_answers_in_utc_when_asked_with_an_offset(site: Live) -> None:
    moment = site.now_ms - DAY_MS
    (row,) = await rows(site, {"rows": [{"user_id": "u", "as_of": local_time(moment, 330).isoformat()}]})
    assert row["as_of"] == rfc3339(moment)


async def test_history_leaves_out_later_arrivals_when_known_at_is_given(site: Live) -> None:
    user = new_user()
    moment = site.now_ms - DAY_MS
    await site.send(served(user, moment))
    asked = {"rows": [{"user_id": user, "as_of": rfc3339(moment)}], "features": ["tip_volume_30d"]}
    counts = [
        (await rows(site, {**asked, **known}))[0]["features"]["tip_volume_30d"]
        for known in ({}, {"known_at": None}, {"known_at": "as_of"}, {"known_at": rfc3339(site.now_ms)})
    ]
    assert counts == [1, 1, 0, 1]


async def test_history_is_refused_when_its_body_is_invalid(site: Live) -> None:
    sound = {"user_id": "u", "as_of": rfc3339(site.now_ms - DAY_MS)}
    future, ancient = rfc3339(site.now_ms + 60_000), rfc3339(site.now_ms - 151 * DAY_MS)
    ends_of_time = ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
    moments = [sound["as_of"][:-1], site.now_ms, future, ancient, *ends_of_time]
    bodies = [
        *(({"rows": rows}, "rows") for rows in ([], [sound] * 10_001)),
        ({}, "rows"),
        ({"rows": [sound, 1]}, "rows[1]"),
        ({"rows": [sound, {"as_of": sound["as_of"]}]}, "rows[1].user_id"),
        *(({"rows": [sound, {**sound, "user_id": user}]}, "rows[1].user_id") for user in ("", "..", "a/b")),
        ({"rows": [sound, {**sound, "more": 1}]}, "rows[1].more"),
        ({"rows": [sound, {"user_id": "u"}]}, "rows[1].as_of"),
        *(({"rows": [sound, {**sound, "as_of": moment}]}, "rows[1].as_of") for moment in moments),
        ({"rows": [sound], "features": ["nope"]}, "features"),
        *(({"rows": [sound], "known_at": at}, "known_at") for at in ("now", future, "0001-01-01T00:00:00+14:00x")),
    ]
    await assert_refused(site, "/profiles/history", bodies)
    answer = await site.client.post("/profiles/history", json={"rows": [{**sound, "as_of": future}] * 2})
    assert paths(problem(answer, 422)) == ["rows[0].as_of", "rows[1].as_of"]


async def test_history_is_served_when_it_has_the_largest_length(site: Live) -> None:
    at = rfc3339(site.now_ms - DAY_MS)
    asked = [{"user_id": f"u{number % 500}", "as_of": at} for number in range(10_000)]
    found = await rows(site, {"rows": asked, "features": ["tip_volume_30d"]})
    assert [row["user_id"] for row in found] == [row["user_id"] for row in asked]
