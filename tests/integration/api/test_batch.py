"""`POST /profiles/batch`: many profiles at once."""

from typing import Any

import pytest

from tests.integration.api.test_profiles import COLD, active_user
from tests.support.live import JSON, Live, assert_refused, new_user, paths, problem

pytestmark = pytest.mark.both_engines


async def batch(site: Live, body: dict[str, Any]) -> Any:
    answer = await site.client.post("/profiles/batch", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


async def test_batch_keeps_the_order_and_repeats(site: Live) -> None:
    active, cold = await active_user(site), new_user()
    body = await batch(site, {"user_ids": [cold, active, cold, "🎯 x", active]})
    assert [row["user_id"] for row in body["profiles"]] == [cold, active, cold, "🎯 x", active]
    assert body["profiles"][0]["features"] == COLD
    assert body["profiles"][1] == body["profiles"][4] == {"user_id": active, "features": await site.features(active)}
    assert body.keys() == {"profiles"}


async def test_batch_has_only_the_features_selected(site: Live) -> None:
    body = await batch(site, {"user_ids": [new_user()], "features": ["tip_volume_30d"]})
    assert body["profiles"][0]["features"] == {"tip_volume_30d": 0}


async def test_batch_is_served_when_it_has_the_largest_length(site: Live) -> None:
    users = [f"{new_user()}-{number}" for number in range(1_000)]
    body = await batch(site, {"user_ids": users})
    assert [row["user_id"] for row in body["profiles"]] == users


async def test_batch_is_refused_when_its_body_is_invalid(site: Live) -> None:
    ids = [1, None, "", "x" * 129, "a/b", "..", "a\x00b"]
    lists = [([], "features"), (["nope"], "features"), ([1], "features[0]")]
    bodies = [
        *(({"user_ids": ["u", wrong]}, "user_ids[1]") for wrong in ids),
        *(({"user_ids": ["u"], "features": wrong}, place) for wrong, place in lists),
        *(({"user_ids": wrong}, "user_ids") for wrong in ([], ["u"] * 1_001, "u")),
        ({"user_ids": ["u"], "more": 1}, "more"),
        *(({}, "user_ids"), ([], "$"), ("u", "$")),
    ]
    await assert_refused(site, "/profiles/batch", bodies)


async def test_batch_names_every_id_when_several_are_bad(site: Live) -> None:
    answer = await site.client.post("/profiles/batch", json={"user_ids": [".", "fine", "a/b"]})
    assert paths(problem(answer, 422)) == ["user_ids[0]", "user_ids[2]"]


async def test_batch_shows_a_hundred_issues_when_there_are_more(site: Live) -> None:
    body = problem(await site.client.post("/profiles/batch", json={"user_ids": ["."] * 150}), 422)
    assert len(body["errors"]) == 101
    assert body["errors"][-1] == {"path": "…", "detail": "and 50 more"}


async def test_batch_is_read_when_it_has_no_content_type(site: Live) -> None:
    answer = await site.client.post("/profiles/batch", content=b'{"user_ids": ["u"]}')
    assert "content-type" not in answer.request.headers
    assert answer.status_code == 200


async def test_batch_reads_null_features_as_all(site: Live) -> None:
    answer = await site.client.post("/profiles/batch", content=b'{"user_ids":["u"],"features":null}', headers=JSON)
    assert answer.json()["profiles"][0]["features"].keys() == COLD.keys()
