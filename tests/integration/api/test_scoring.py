"""`POST /score` and `GET /decisions/{decision_id}`: rankings, refusals, and explanations of decisions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest

from app.api.request_parsing import with_mirror
from app.api.scoring import ScoreRequest
from app.bandit.model.inputs import SPEC_V1
from app.errors import StoreFull
from app.features.clock import rfc3339
from tests.support.database import column
from tests.support.events import feedback, served
from tests.support.features import ProfileFeatures
from tests.support.live import JSON, Live, assert_refused, new_user, paths, problem
from tests.support.registry import REGISTRY

pytestmark = pytest.mark.both_engines

AT = "2026-04-25T08:30:00+02:00"


def candidates(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "id": f"tip-{number}",
            "features": {"is_overdue": number % 2 == 0, "task_age_days": number, "priority": -number},
        }
        for number in range(count)
    ]


async def post(site: Live, **fields: Any) -> httpx.Response:
    return await site.client.post("/score", content=json.dumps(request(**fields)), headers=JSON)


async def score(site: Live, **fields: Any) -> dict[str, Any]:
    answer = await post(site, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


async def decision(site: Live, decision_id: str) -> dict[str, Any]:
    found: dict[str, Any] = await site.json(f"/decisions/{decision_id}")
    return found


async def consume(site: Live) -> None:
    rows = await site.service.database.read(lambda c: c.execute("SELECT seq FROM outbox").fetchall())
    await site.service.consumer.consume([seq for (seq,) in rows])


async def test_candidates_are_ranked_by_score_and_one_is_chosen(site: Live) -> None:
    user = new_user()
    found = await score(site, user_id=user, candidates=candidates(7), context={"at": AT})
    assert found.keys() == {"decision_id", "chosen_id", "ranking", "policy", "profile"}
    assert {item["id"] for item in found["ranking"]} == {f"tip-{number}" for number in range(7)}
    assert found["chosen_id"] in {item["id"] for item in found["ranking"]}
    scores = [item["score"] for item in found["ranking"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(item["probability"] for item in found["ranking"]) == pytest.approx(1)
    assert min(item["probability"] for item in found["ranking"]) >= 0.1 / 7
    assert found["policy"] == {"id": "lints-v1", "spec_hash": SPEC_V1.hash, "state_version": 0}
    assert found["profile"] == {"origin": "service"}


async def test_events_of_a_decision_teach_the_model(own_site: Live) -> None:
    site, user = own_site, new_user()
    found: dict[str, Any] = {}
    for number in range(12):
        found = await score(site, user_id=user)
        good = found["chosen_id"] == "tip-1"
        name: dict[str, Any] = {
            "tip_id": found["chosen_id"],
            "decision_id": found["decision_id"] if number % 2 else None,
        }
        await site.send(
            served(user, site.now_ms, **name),
            feedback(user, site.now_ms, "completed" if good else "dismissed", **name),
        )
        await consume(site)
    assert found["policy"]["state_version"] == 11
    last = await score(site, user_id=user, explore=False)
    assert last["policy"]["state_version"] == 12
    assert last["chosen_id"] == last["ranking"][0]["id"] == "tip-1"
    assert [item["probability"] for item in last["ranking"]] == [1.0, 0.0, 0.0]
    told = await decision(site, found["decision_id"])
    assert told["outcome"]["state"] == "learned"
    assert told["outcome"]["reward"] in (0.0, 1.0)
    assert told["outcome"]["source"] == "feedback"
    erased = await site.client.get(f"/admin/users/{user}/erase", headers={"Accept": "application/json"})
    assert (erased.json()["decisions"], erased.json()["learned"]) == (13, 12)
    await site.client.delete(f"/admin/users/{user}")
    problem(await site.client.get(f"/decisions/{found['decision_id']}"), 404)
    assert (await score(site, user_id=user))["policy"]["state_version"] == 0


async def test_decision_is_explained(own_site: Live) -> None:
    site, user = own_site, new_user()
    await site.send(*(served(user, site.now_ms) for _ in range(3)))
    sent_at = rfc3339(site.now_ms)
    request_id = new_user("request")
    found = await score(site, user_id=user, request_id=request_id, context={"at": AT})
    await site.service.bandit.maintenance.shadow()
    told = await decision(site, found["decision_id"])
    assert (told["user_id"], told["request_id"], told["explore"], told["chosen_id"]) == (
        user,
        request_id,
        True,
        found["chosen_id"],
    )
    assert told["policy"] == {**found["policy"], "role": "champion", "prior_version": 0}
    assert told["profile"]["origin"] == "service"
    assert told["profile"]["features"] == await site.features(user)
    assert told["profile"]["features"]["tip_volume_30d"] == 3
    (newest,) = await column(site.service.database, "SELECT MAX(seq) FROM event_log WHERE user_id = ?", user)
    assert told["profile"]["versions"] == dict.fromkeys(REGISTRY.names, newest)
    assert sent_at <= told["profile"]["read_at"] <= told["decided_at"]
    assert told["context"] == {"at": AT}
    assert [{"id": item["id"], "features": item["features"]} for item in told["candidates"]] == candidates()
    ranked = {item["id"]: item for item in found["ranking"]}
    for item in told["candidates"]:
        assert (item["score"], item["probability"]) == (ranked[item["id"]]["score"], ranked[item["id"]]["probability"])
        assert list(item["contributions"]) == list(SPEC_V1.names)
        assert sum(item["contributions"].values()) == pytest.approx(item["score"], abs=1e-12)
    assert told["shadow"]["role"] == "challenger"
    assert [item["id"] for item in told["shadow"]["candidates"]] == ["tip-0", "tip-1", "tip-2"]
    assert sum(item["probability"] for item in told["shadow"]["candidates"]) == pytest.approx(1)
    assert told["outcome"] == {
        "state": "open",
        "served_at": None,
        "reward": None,
        "source": None,
        "action": None,
        "settled_at": None,
        "late": 0,
        "repeated": 0,
        "other_tip": 0,
    }


async def test_repeated_request_gets_the_same_bytes(site: Live) -> None:
    user, request_id = new_user(), new_user("request")
    first = await post(site, user_id=user, request_id=request_id, candidates=candidates(9))
    again = await post(site, user_id=user, request_id=request_id, candidates=candidates(2), explore=False)
    assert (first.status_code, again.content) == (200, first.content)
    at_once = await asyncio.gather(*(post(site, user_id=user, request_id=f"{request_id}-2") for _ in range(10)))
    assert len({answer.content for answer in at_once}) == 1
    other = await post(site, user_id=new_user(), request_id=request_id)
    assert (other.status_code, other.content == first.content) == (200, False)


async def test_profile_features_of_the_request_are_used(site: Live) -> None:
    for used in (
        {},
        {"preferred_hour": None, "tip_volume_30d": 3},
        {"completion_rate_30d": 1},
        {"tip_volume_30d": 10**30, "preferred_hour": -5},
        {"preferred_hour": 9.0, "completion_rate_30d": 1.0},
        {"mean_dwell_ms_30d": 1e308},
    ):
        found = await score(site, profile_features={**used, "mood": [{"deep": 1}]})
        assert found["profile"] == {"origin": "request"}
        told = (await decision(site, found["decision_id"]))["profile"]
        assert told == {"origin": "request", "features": used, "read_at": None, "versions": None}
    found = await score(site, profile_features=None)
    told = (await decision(site, found["decision_id"]))["profile"]
    assert told == {"origin": "absent", "features": None, "read_at": None, "versions": None}


def request(**fields: Any) -> dict[str, Any]:
    """A valid request except for these fields; `...` leaves one out."""
    asked = {"user_id": "ann", "candidates": candidates(), **fields}
    return {name: value for name, value in asked.items() if value is not ...}


def one(**features: Any) -> dict[str, Any]:
    """A candidate with valid features except for these; `...` leaves one out."""
    good = {"is_overdue": False, "task_age_days": 1.0, "priority": 1.0, **features}
    return {"id": "x", "features": {name: value for name, value in good.items() if value is not ...}}


async def test_request_is_refused_when_a_field_is_invalid(site: Live) -> None:
    features = {
        "completion_rate_30d": ("half",),
        "dismiss_rate_30d": (True,),
        "preferred_hour": (8.5, "8"),
        "tip_volume_30d": ([3],),
    }
    fields: dict[str, tuple[object, ...]] = {
        "candidates": ([], candidates(101), ..., {}),
        "user_id": (..., "a/b"),
        "request_id": ("", "\x85"),
        "explore": (1,),
        "mood": (1,),
        "profile_features": ([], "keen"),
    }
    context = {"at": ("2026-04-25T08:30:00", 7), "weather": ("fine",)}
    bodies = [
        *((request(**{name: value}), name) for name, values in fields.items() for value in values),
        *((request(context={name: value}), f"context.{name}") for name, values in context.items() for value in values),
        *(
            (request(profile_features={name: value}), f"profile_features.{name}")
            for name, values in features.items()
            for value in values
        ),
    ]
    await assert_refused(site, "/score", bodies)


async def test_request_is_refused_when_a_candidate_is_invalid(site: Live) -> None:
    features = {
        "is_overdue": (1, ...),
        "task_age_days": (-0.5, "old"),
        "priority": (None, [1], 10**400),
        "mood": (1,),
    }
    rows = [
        *((one(**{name: value}), f".features.{name}") for name, values in features.items() for value in values),
        ({"id": "x"}, ".features"),
        ({"features": one()["features"]}, ".id"),
        *(({**one(), "id": value}, ".id") for value in ("", "a/b", "x" * 129, "tip-1")),
        ({**one(), "extra": 1}, ".extra"),
        (7, ""),
    ]
    bodies = [(request(candidates=[*candidates(3), wrong]), f"candidates[3]{place}") for wrong, place in rows]
    await assert_refused(site, "/score", bodies)


async def test_every_invalid_candidate_is_named(site: Live) -> None:
    sent = [one(priority="x"), *candidates(1), one(is_overdue=None), {"id": 3}]
    assert paths(problem(await post(site, candidates=sent), 422)) == [
        "candidates[0].features.priority",
        "candidates[2].features.is_overdue",
        "candidates[3].id",
    ]
    huge = b'{"user_id":"u","candidates":[%b]}' % b",".join([b'{"id":"a","features":{"is_overdue":1}}'] * 10_000)
    answer = await site.client.post("/score", content=huge, headers=JSON)
    assert paths(problem(answer, 422)) == ["candidates[0].features.is_overdue"]


async def test_request_is_refused_when_candidates_are_sent_twice(site: Live) -> None:
    for again in ("5", "null", "[]"):
        body = '{"user_id": "ada", "candidates": [{"id": 5}], "candidates": ' + again + "}"
        answer = await site.client.post("/score", content=body, headers=JSON)
        assert paths(problem(answer, 422)) == ["candidates[0].id"], again


async def test_request_is_refused_when_a_number_is_not_finite(site: Live) -> None:
    place = "candidates[3].features.priority"
    for number, status, places in (("1e999", 422, [place]), ("-1e999", 422, [place]), ("NaN", 400, [])):
        body = json.dumps(request(candidates=[*candidates(3), one(priority=0.5)])).replace("0.5", number)
        answer = await site.client.post("/score", content=body, headers=JSON)
        assert (answer.status_code, paths(answer.json())) == (status, places), number


async def test_largest_and_smallest_numbers_are_accepted(site: Live) -> None:
    sent = [
        {"id": str(place), "features": {"is_overdue": False, "task_age_days": age, "priority": priority}}
        for place, (age, priority) in enumerate([(0, 0), (1.7e308, -1.7e308), (5e-324, 1.7e308)])
    ]
    found = await score(site, candidates=sent, context={"at": "0001-01-01T00:00:00+14:00"})
    assert all(0 <= item["probability"] <= 1 for item in found["ranking"])
    assert (await decision(site, found["decision_id"]))["context"] == {"at": "0001-01-01T00:00:00+14:00"}


async def test_one_candidate_and_a_hundred_are_ranked(site: Live) -> None:
    assert (await score(site, candidates=candidates(1)))["ranking"][0]["probability"] == pytest.approx(1)
    assert len((await score(site, candidates=candidates(100)))["ranking"]) == 100


async def test_decision_is_not_found_when_it_does_not_exist(site: Live) -> None:
    for name in ("nope", "%00", "a%2Fb", "x" * 129):
        answer = await site.client.get(f"/decisions/{name}")
        problem(answer, 404 if name == "nope" else 422)


async def test_request_is_shed_unread_when_too_many_wait(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = own_site.service.bandit.scorer
    with monkeypatch.context() as patch:
        patch.setattr(type(scorer), "overloaded", property(lambda _: True))
        answer = await own_site.client.post("/score", content=b"{" * 1_000_000, headers=JSON)
        assert "too much load (scores)" in problem(answer, 503)["detail"]
        assert answer.headers["retry-after"] == "1"
    counted = own_site.service.metrics.collectors.get_sample_value
    assert counted("profiles_requests_shed_total", {"kind": "scores"}) == 1
    assert (await post(own_site)).status_code == 200
    assert counted("profiles_decisions_total", {"policy": "lints-v1", "profile": "service"}) == 1


async def test_decoded_request_equals_the_documented_one() -> None:
    read = with_mirror(ScoreRequest, ProfileFeatures)
    assert issubclass(read, ScoreRequest)
    assert {item.name for item in msgspec.structs.fields(read)} == {
        item.name for item in msgspec.structs.fields(ScoreRequest)
    }
    assert set(REGISTRY.names) == {item.name for item in msgspec.structs.fields(ProfileFeatures)}


async def test_decision_is_refused_when_the_disk_is_full(own_site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = "SELECT request_id FROM tip_scores"
    with monkeypatch.context() as full:

        async def write(*_: object, **__: object) -> None:
            raise StoreFull("the database has no room to write: database or disk is full")

        full.setattr(own_site.service.database, "write", write)
        answer = await post(own_site, request_id="again")
        assert "no room" in problem(answer, 507)["detail"]
        assert answer.headers["retry-after"] == "10"
        assert await column(own_site.service.database, stored) == []
    assert (await score(own_site, request_id="again"))["chosen_id"].startswith("tip-")
    assert await column(own_site.service.database, stored) == ["again"]
