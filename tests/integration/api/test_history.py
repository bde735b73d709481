"""`POST /profiles/history`: the training set."""

from __future__ import annotations

from typing import Any

import pytest

from app.features.clock import DAY_MS, rfc3339
from tests.support.events import local_time, served
from tests.support.live import Live, new_user, paths, problem


async def rows(site: Live, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await site.client.post("/profiles/history", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json().keys() == {"rows"}
    found: list[dict[str, Any]] = answer.json()["rows"]
    return found


async def test_history_has_each_row_at_its_own_moment_in_the_order_asked(site: Live) -> None:
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


async def test_history_leaves_out_what_arrived_later_when_known_at_says_so(site: Live) -> None:
    user = new_user()
    moment = site.now_ms - DAY_MS
    await site.send(served(user, moment))
    asked = {"rows": [{"user_id": user, "as_of": rfc3339(moment)}], "features": ["tip_volume_30d"]}
    counts = [
        (await rows(site, {**asked, **known}))[0]["features"]["tip_volume_30d"]
        for known in ({}, {"known_at": None}, {"known_at": "as_of"}, {"known_at": rfc3339(site.now_ms)})
    ]
    assert counts == [1, 1, 0, 1]


def _bad_bodies(now_ms: int) -> dict[str, tuple[object, list[str]]]:
    sound = {"user_id": "u", "as_of": rfc3339(now_ms - DAY_MS)}

    def second(**changes: object) -> dict[str, object]:
        return {"rows": [sound, {name: value for name, value in {**sound, **changes}.items() if value is not ...}]}

    future, ancient = rfc3339(now_ms + 60_000), rfc3339(now_ms - 151 * DAY_MS)
    return {
        "no rows": ({"rows": []}, ["rows"]),
        "rows left out": ({}, ["rows"]),
        "too many rows": ({"rows": [sound] * 10_001}, ["rows"]),
        "row no object": ({"rows": [sound, 1]}, ["rows[1]"]),
        "no user": (second(user_id=...), ["rows[1].user_id"]),
        "empty user": (second(user_id=""), ["rows[1].user_id"]),
        "user ..": (second(user_id=".."), ["rows[1].user_id"]),
        "user with a slash": (second(user_id="a/b"), ["rows[1].user_id"]),
        "unknown field": (second(more=1), ["rows[1].more"]),
        "no moment": (second(as_of=...), ["rows[1].as_of"]),
        "moment without offset": (second(as_of=sound["as_of"][:-1]), ["rows[1].as_of"]),
        "moment a number": (second(as_of=now_ms), ["rows[1].as_of"]),
        "moment in the future": (second(as_of=future), ["rows[1].as_of"]),
        "moment beyond kept history": (second(as_of=ancient), ["rows[1].as_of"]),
        "moment before time": (second(as_of="0001-01-01T00:00:00+14:00"), ["rows[1].as_of"]),
        "moment after time": (second(as_of="9999-12-31T23:59:59-14:00"), ["rows[1].as_of"]),
        "two bad moments": ({"rows": [{**sound, "as_of": future}] * 2}, ["rows[0].as_of", "rows[1].as_of"]),
        "unknown feature": ({"rows": [sound], "features": ["nope"]}, ["features"]),
        "known_at no time": ({"rows": [sound], "known_at": "now"}, ["known_at"]),
        "known_at in the future": ({"rows": [sound], "known_at": future}, ["known_at"]),
        "known_at before time": ({"rows": [sound], "known_at": "0001-01-01T00:00:00+14:00x"}, ["known_at"]),
    }


@pytest.mark.parametrize("case", _bad_bodies(0))
async def test_history_is_refused_when_its_body_is_invalid(site: Live, case: str) -> None:
    body, places = _bad_bodies(site.now_ms)[case]
    assert paths(problem(await site.client.post("/profiles/history", json=body), 422)) == places


async def test_history_is_served_when_it_is_as_long_as_it_may_be(site: Live) -> None:
    at = rfc3339(site.now_ms - DAY_MS)
    asked = [{"user_id": f"u{number % 500}", "as_of": at} for number in range(10_000)]
    found = await rows(site, {"rows": asked, "features": ["tip_volume_30d"]})
    assert [row["user_id"] for row in found] == [row["user_id"] for row in asked]
