"""Rebuilding some of a user's features, and what erasing would delete."""

from arq.constants import job_key_prefix

from app.stores.queue.client import QUEUE
from app.stores.queue.jobs import TIP_EVENTS, serialize
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.api.admin.test_user_inspection import look
from tests.integration.api.admin.test_users import put
from tests.support.audit import newest_entries
from tests.support.events import feedback, served
from tests.support.live import JSON, Live, assert_refused, new_user, problem
from tests.support.servers import ask
from tests.support.site import ServeSite


async def test_only_the_named_features_are_rebuilt(own_site: Live, cache_server: EmbeddedServer) -> None:
    site, user = own_site, new_user()
    await site.send(served(user, site.now_ms), feedback(user, site.now_ms))
    for name in ("tip_volume_30d", "preferred_hour"):
        await put(site, cache_server, user, name, seq=10**9)
    answer = await site.client.post(f"/admin/users/{user}/rebuild", json={"features": ["tip_volume_30d"]})
    assert answer.status_code == 200
    assert answer.json()["features"].keys() == {"tip_volume_30d"}
    assert answer.json()["features"]["tip_volume_30d"]["value"] == 1
    after = await site.features(user)
    assert (after["tip_volume_30d"], after["preferred_hour"]) == (1, 77)
    (entry,) = await newest_entries(site.service.audit_trail, 1)
    assert (entry.action, entry.outcome) == ("rebuild", "done: tip_volume_30d")


async def test_all_features_are_rebuilt_when_none_is_named(own_site: Live) -> None:
    for body in ({}, {"features": None}):
        assert len((await own_site.json("/admin/users/ann/rebuild", "POST", json=body))["features"]) == 5
        (entry,) = await newest_entries(own_site.service.audit_trail, 1)
        assert entry.outcome == "done"


async def test_nothing_is_rebuilt_when_the_body_is_invalid(own_site: Live) -> None:
    bodies: list[tuple[object, str]] = [
        *(({"features": names}, "features") for names in (["nope"], [])),
        ({"feature": "tip_volume_30d"}, "feature"),
        ([], "$"),
    ]
    await assert_refused(own_site, "/admin/users/ann/rebuild", bodies)
    problem(await own_site.client.post("/admin/users/ann/rebuild", content=b"nonsense", headers=JSON), 400)
    assert await newest_entries(own_site.service.audit_trail, 1) == []


async def test_preview_of_erasing_counts_and_deletes_nothing(site: Live) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms), served(user, site.now_ms), feedback(user, site.now_ms))
    await site.features(user)
    await site.filled()
    told = [await look(site, user, "/erase") for _ in range(2)]
    none = {"dead_letters": 0, "rebuilds": 0, "decisions": 0, "learned": 0}
    assert told == [{"user_id": user, "views": 2, "feedback": 1, "cached": 5, **none}] * 2
    await site.client.delete(f"/admin/users/{user}")
    assert await look(site, user, "/erase") == {**told[0], "views": 0, "feedback": 0, "cached": 0}


async def test_erasing_reaches_earlier_epochs_and_queued_jobs(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    event = {"user_id": "ann", "tip_id": "t"}
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        await site.send(served("ann", site.now_ms))
        await site.features("ann")
        await site.filled()
        ask(cache, "SET", "pf:0123456789ab:{ann}:tip_volume_30d", "V of another epoch")
        ask(queue, "SET", f"{job_key_prefix}j", serialize({"f": TIP_EVENTS, "a": [[event]]}))
        ask(queue, "ZADD", QUEUE, 1, "j")
        assert (await site.client.delete("/admin/users/ann")).status_code == 204
        assert ask(cache, "KEYS", "*ann*") == []
        assert b"ann" not in ask(queue, "GET", f"{job_key_prefix}j")


async def test_erasing_is_incomplete_when_the_queue_is_down(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        await site.send(served("ann", site.now_ms))
        queue.kill()
        told = problem(await site.client.delete("/admin/users/ann"), 503)
        assert told["detail"].startswith("the user is erased except for jobs in the queue: ")
        assert told["detail"].endswith("; erase again later")
        assert (await look(site, "ann", "/erase"))["views"] == 0
        (entry,) = await newest_entries(site.service.audit_trail, 1)
        assert (entry.action, "except for jobs" in entry.outcome) == ("erase", True)
        queue.start()
        assert (await site.client.delete("/admin/users/ann")).status_code == 204
