"""`POST /profiles/history`: the training set."""

import json
from typing import Any

import pytest

from app.features.clock import DAY_MS, rfc3339
from tests.support.events import feedback, local_time, served
from tests.support.live import JSON, Live, assert_refused, new_user, paths, problem
from tests.support.longest_step import assert_no_long_step, longest_step

pytestmark = pytest.mark.both_engines


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
    await assert_refused(site, "/profiles/history", [({"rows": [sound] * 2, "known_at": future}, "known_at")])
    answer = await site.client.post("/profiles/history", json={"rows": [{**sound, "as_of": future}] * 2})
    assert paths(problem(answer, 422)) == ["rows[0].as_of", "rows[1].as_of"]


async def decided(site: Live, user: str, **fields: Any) -> dict[str, Any]:
    tips = [{"id": "t", "features": {"is_overdue": False, "task_age_days": 1, "priority": 1}}]
    made = await site.json("/score", "POST", json={"user_id": user, "candidates": tips, **fields})
    found: dict[str, Any] = await site.json(f"/decisions/{made['decision_id']}")
    return found


async def test_decision_has_the_values_that_it_was_made_from(site: Live) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms), feedback(user, site.now_ms))
    made = [await decided(site, user)]
    await site.send(served(user, site.now_ms))
    made.append(await decided(site, user))
    moment = rfc3339(site.now_ms - DAY_MS)
    asked: list[dict[str, Any]] = [{"decision_id": one["decision_id"]} for one in (*made, made[0])]
    found = await rows(site, {"rows": [*asked, {"user_id": user, "as_of": moment}], "known_at": "as_of"})
    assert found[:3] == [
        {"user_id": user, "as_of": one["profile"]["read_at"], "features": one["profile"]["features"]}
        for one in (*made, made[0])
    ]
    assert [row["features"]["tip_volume_30d"] for row in found] == [1, 2, 1, 0]
    (row,) = await rows(site, {"rows": asked[:1], "features": ["preferred_hour"]})
    assert row["features"] == {"preferred_hour": made[0]["profile"]["features"]["preferred_hour"]}


async def test_history_is_refused_when_a_decision_cannot_be_used(site: Live) -> None:
    user = new_user()
    known = (await decided(site, user))["decision_id"]
    absent = (await decided(site, user, profile_features=None))["decision_id"]
    old = (await decided(site, user))["decision_id"]
    await site.service.database.execute("UPDATE tip_scores SET profile_read = NULL WHERE decision_id = ?", (old,))
    moment = {"user_id": user, "as_of": rfc3339(site.now_ms - DAY_MS)}
    sound = {"decision_id": known}
    bodies = [
        *(({"rows": [sound, {**sound, name: moment[name]}]}, f"rows[1].{name}") for name in moment),
        *(
            ({"rows": [sound, {"decision_id": wrong}]}, "rows[1].decision_id")
            for wrong in ("none", absent, old, "", "a\0b", 7)
        ),
        ({"rows": [sound, {}]}, "rows[1].user_id"),
    ]
    await assert_refused(site, "/profiles/history", bodies)
    wrong = {"rows": [{"decision_id": "none"}, sound, {"decision_id": absent}, {"user_id": user}]}
    answer = await site.client.post("/profiles/history", json=wrong)
    assert paths(problem(answer, 422)) == ["rows[0].decision_id", "rows[2].decision_id", "rows[3].as_of"]


@pytest.mark.slow
async def test_history_is_served_when_it_has_the_largest_length(site: Live) -> None:
    at = rfc3339(site.now_ms - DAY_MS)
    asked = [{"user_id": f"u{number % 500}", "as_of": at} for number in range(10_000)]
    found = await rows(site, {"rows": asked, "features": ["tip_volume_30d"]})
    assert [row["user_id"] for row in found] == [row["user_id"] for row in asked]


@pytest.mark.slow
@pytest.mark.parametrize("status", [200, 422])
async def test_history_does_not_block_other_requests_when_it_is_long(site: Live, status: int) -> None:
    at = rfc3339(site.now_ms + (DAY_MS if status == 422 else -DAY_MS))
    asked = [{"user_id": f"u{number % 500}", "as_of": at} for number in range(10_000)]
    content = json.dumps({"rows": asked})

    async def run() -> float:
        async with longest_step() as step:
            answer = await site.client.post("/profiles/history", content=content, headers=JSON)
        assert answer.status_code == status
        return step.seconds

    await assert_no_long_step(run)
