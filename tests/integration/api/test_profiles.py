"""`GET /profiles/{user_id}` and `GET /features`: the recommender's contract."""

import re
from datetime import datetime
from urllib.parse import quote

import pytest

from app.features.clock import DAY_MS, rfc3339, to_ms
from tests.support.events import feedback, local_time, served
from tests.support.live import Live, new_user, paths, problem
from tests.support.registry import REGISTRY

pytestmark = pytest.mark.both_engines

COLD = {
    "completion_rate_30d": None,
    "dismiss_rate_30d": None,
    "mean_dwell_ms_30d": None,
    "preferred_hour": None,
    "tip_volume_30d": 0,
}
RFC3339_MS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def active_user(site: Live) -> str:
    user = new_user()
    now = site.now_ms
    await site.send(
        served(user, now - 3_000),
        feedback(user, now - 2_000, "completed", dwell_ms=1_000, offset_min=120),
        feedback(user, now - 1_000, "dismissed", dwell_ms=2_000),
    )
    return user


async def test_profile_has_the_defaults_when_the_user_is_cold(site: Live) -> None:
    user = new_user()
    answer = await site.client.get(f"/profiles/{user}")
    assert answer.status_code == 200
    assert answer.json() == {"user_id": user, "features": COLD}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_profile_reflects_events_when_they_were_acknowledged(site: Live) -> None:
    user = await active_user(site)
    hour = local_time(site.now_ms - 2_000, 120).hour
    assert await site.features(user) == {
        "completion_rate_30d": 0.5,
        "dismiss_rate_30d": 0.5,
        "mean_dwell_ms_30d": 1500.0,
        "preferred_hour": hour,
        "tip_volume_30d": 1,
    }


async def test_request_id_is_echoed_when_it_is_valid(site: Live) -> None:
    answer = await site.client.get("/profiles/u", headers={"X-Request-Id": "trace-1.a_B"})
    assert answer.headers.get_list("x-request-id") == ["trace-1.a_B"]


async def test_request_id_is_generated_when_it_is_missing_or_invalid(site: Live) -> None:
    for sent in (None, "", "a b", "x" * 65, "a\tb", "é", "<script>", 'a"b'):
        headers = [] if sent is None else [(b"X-Request-Id", sent.encode())]
        answer = await site.client.get("/profiles/u", headers=headers)
        assert re.fullmatch(r"[0-9a-f]{16}", answer.headers["x-request-id"]), sent


async def test_profile_has_only_the_selected_features(site: Live) -> None:
    for selected, names in (
        ("tip_volume_30d", ["tip_volume_30d"]),
        ("tip_volume_30d,completion_rate_30d", ["completion_rate_30d", "tip_volume_30d"]),
        ("tip_volume_30d,tip_volume_30d", ["tip_volume_30d"]),
        ("tip_volume_30d%2Cpreferred_hour", ["preferred_hour", "tip_volume_30d"]),
    ):
        assert list((await site.json(f"/profiles/u?features={selected}"))["features"]) == names, selected


async def test_profile_is_refused_when_a_selected_feature_is_unknown(site: Live) -> None:
    for selected in ("nope", "", "tip_volume_30d,", "tip_volume_30d,nope", " tip_volume_30d", "%00"):
        body = problem(await site.client.get(f"/profiles/u?features={selected}"), 400)
        assert set(paths(body)) == {"features"}
        assert "tip_volume_30d" in body["errors"][0]["detail"], selected


async def test_detail_shows_the_origin_of_each_value(site: Live) -> None:
    user = await active_user(site)
    first = (await site.client.get(f"/profiles/{user}?detail=true")).json()
    await site.filled()
    second = (await site.client.get(f"/profiles/{user}?detail=true")).json()
    plain = await site.features(user)
    assert first["user_id"] == user
    for entry in REGISTRY:
        computed, cached = first["features"][entry.name], second["features"][entry.name]
        assert computed.keys() == {"value", "dtype", "computed_at", "expires_at", "origin"}
        assert (computed["origin"], cached["origin"]) == ("computed", "cache")
        assert computed["value"] == cached["value"] == plain[entry.name]
        assert computed["dtype"] == entry.dtype
        assert computed["computed_at"] == cached["computed_at"]
        for time in ("computed_at", "expires_at"):
            assert RFC3339_MS.fullmatch(cached[time]), cached[time]
        assert cached["computed_at"] < cached["expires_at"] <= rfc3339(site.now_ms + entry.ttl_ms)


async def test_both_ways_to_read_details_agree(site: Live) -> None:
    user = await active_user(site)
    await site.client.get(f"/profiles/{user}")
    await site.filled()
    for query in ("", "features=preferred_hour", f"as_of={rfc3339(site.now_ms - DAY_MS)}"):
        answer = await site.json(f"/profiles/{user}/detail?{query}")
        assert answer == await site.json(f"/profiles/{user}?detail=true&{query}"), query
    for query in ("detail=true", "features=shoe_size", "known_at=2026-01-01T00:00:00Z"):
        problem(await site.client.get(f"/profiles/{user}/detail?{query}"), 400)


async def test_detail_is_left_out_when_it_is_false(site: Live) -> None:
    for value in ("false", "0"):
        assert (await site.json(f"/profiles/u?detail={value}"))["features"]["tip_volume_30d"] == 0


async def test_as_of_bounds_event_time_and_caches_nothing(site: Live) -> None:
    user = new_user()
    moment = site.now_ms - 2 * DAY_MS
    await site.send(served(user, moment), served(user, moment + 1))
    counts = {}
    for at in (moment - 1, moment, moment + 1):
        answer = await site.client.get(f"/profiles/{user}", params={"as_of": rfc3339(at), "detail": "true"})
        cell = answer.json()["features"]["tip_volume_30d"]
        counts[at - moment] = cell["value"]
        assert (cell["origin"], cell["expires_at"], cell["computed_at"]) == ("computed", None, rfc3339(at))
    assert counts == {-1: 0, 0: 1, 1: 2}
    again = await site.client.get(f"/profiles/{user}?detail=true")
    assert again.json()["features"]["tip_volume_30d"]["origin"] == "computed"


async def test_as_of_is_read_when_its_plus_is_not_escaped(site: Live) -> None:
    moment = local_time(site.now_ms - DAY_MS, 120).isoformat()
    assert moment.endswith("+02:00")
    plain = await site.client.get(f"/profiles/u?as_of={moment}&detail=true")
    escaped = await site.client.get("/profiles/u", params={"as_of": moment, "detail": "true"})
    assert plain.status_code == 200
    assert plain.json() == escaped.json()


async def test_known_at_leaves_out_later_arrivals(site: Live) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms - DAY_MS))
    event = (await site.client.get(f"/admin/users/{user}")).json()["events"][0]
    arrival = to_ms(datetime.fromisoformat(event["received_at"]))
    for known_at, count in ((arrival - 1, 0), (arrival, 1)):
        params = {"as_of": rfc3339(arrival), "known_at": rfc3339(known_at)}
        answer = await site.client.get(f"/profiles/{user}", params=params)
        assert answer.json()["features"]["tip_volume_30d"] == count


async def test_profile_is_refused_when_its_query_is_invalid(site: Live) -> None:
    past, future = rfc3339(site.now_ms - DAY_MS), rfc3339(site.now_ms + 60_000)
    ends_of_time = ("0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59-14:00")
    malformed = (past[:-1], "1764000000", "", "2026-04-25")
    moments = (future, rfc3339(site.now_ms - 151 * DAY_MS), *ends_of_time, *malformed)
    for query, place in (
        *((f"as_of={moment}", "as_of") for moment in moments),
        *((f"as_of={past}&known_at={moment}", "known_at") for moment in (future, "as_of")),
        (f"known_at={past}", "known_at"),
        *((query, "detail") for query in ("detail=maybe", "detail=", "detail", "detail=true&detail=true")),
        ("feature=tip_volume_30d", "feature"),
        ("features=tip_volume_30d&features=preferred_hour", "features"),
        *(("user_id=x", "user_id"), ("request=x", "request"), ("=x", "")),
    ):
        assert paths(problem(await site.client.get(f"/profiles/u?{query}"), 400)) == [place], query


async def test_as_of_reaches_to_the_edge_of_kept_history(site: Live) -> None:
    earliest = rfc3339(site.now_ms - 150 * DAY_MS + 5_000)
    assert (await site.client.get("/profiles/u", params={"as_of": earliest})).status_code == 200


async def test_profile_is_found_when_its_id_needs_escaping(site: Live) -> None:
    for user in ("a b", "a%b", "a?b", "a#b", "a+b", "é", "🎯", "%2F", "a&b=c", "..." * 3, '"', "x" * 128):
        before = await site.features(user)
        await site.send(served(user, site.now_ms))
        body = await site.json(f"/profiles/{quote(user, safe='')}")
        assert (body["user_id"], body["features"]["tip_volume_30d"]) == (user, before["tip_volume_30d"] + 1)


async def test_features_are_those_of_the_registry(site: Live) -> None:
    answer = await site.client.get("/features")
    assert answer.status_code == 200
    assert answer.json() == {
        "features": [
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "ttl_s": entry.ttl.total_seconds(),
                "window_s": entry.window.total_seconds(),
                "default": entry.default,
                "description": entry.description,
                "invalidated_by": list(entry.invalidated_by),
                "relations": list(entry.relations),
                "fingerprint": entry.fingerprint,
                "us_per_user": None,
                "state": "ok",
                "reason": None,
            }
            for entry in REGISTRY
        ]
    }
    assert b'"default":0,' in answer.content  # of its dtype: no 0.0
