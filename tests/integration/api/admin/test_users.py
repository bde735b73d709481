"""Admin routes of one user: inspect, rebuild, erase."""

import hashlib
import json

import pytest

from app.features.clock import rfc3339
from app.features.events import TipEvent
from app.features.registry import indices
from app.profiles.online.cache_protocol import FeatureValue, decode, encode
from app.profiles.ports import Cell
from app.stores.valkey.cache import key
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.audit import newest_entries
from tests.support.database import contents
from tests.support.events import feedback, payload, served
from tests.support.live import Live, new_user
from tests.support.registry import REGISTRY
from tests.support.servers import ask

pytestmark = pytest.mark.both_engines


async def states(site: Live, user: str) -> dict[str, str | None]:
    answer = await site.client.get(f"/admin/users/{user}")
    assert answer.status_code == 200
    found = {name: cell["freshness"] for name, cell in answer.json()["features"].items()}
    await site.filled()
    return found


async def put(site: Live, server: EmbeddedServer, user: str, feature: str, *, seq: int) -> None:
    """Write 77 to the cache without the service, as if an invalidation were missing."""
    epoch, _ = await site.service.cache.read([Cell(user, feature)])
    now = site.now_ms
    fingerprint = REGISTRY.named(feature).fingerprint.encode()
    value = encode(FeatureValue(fingerprint, seq, now - 1_000, now + 60_000, b"77"))
    ask(server, "SET", key(epoch, Cell(user, feature)), value)


def cached_keys(server: EmbeddedServer, user: str) -> list[bytes]:
    return sorted(ask(server, "KEYS", f"pf:*:{{{user}}}:*"))


async def test_user_view_shows_values_freshness_and_events(site: Live) -> None:
    user = new_user()
    sent: list[TipEvent] = [served(user, site.now_ms - 2), feedback(user, site.now_ms - 1, dwell_ms=10, offset_min=330)]
    await site.send(*sent)
    answer = await site.client.get(f"/admin/users/{user}")
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert body.keys() == {"user_id", "features", "events"}
    assert body["user_id"] == user
    assert {name: cell["value"] for name, cell in body["features"].items()} == await site.features(user)
    for entry in REGISTRY:
        cell = body["features"][entry.name]
        assert (cell["dtype"], cell["invalidated_by"]) == (entry.dtype, list(entry.invalidated_by))
        assert (cell["freshness"], cell["origin"]) == ("missing", "computed")
    newest, oldest = body["events"]
    assert newest["seq"] == oldest["seq"] + 1
    assert [oldest["event"]["event_id"], newest["event"]["event_id"]] == [event.event_id for event in sent]
    assert newest["event"] == payload(sent[1])
    assert newest["received_at"].endswith("Z")


async def test_user_view_shows_the_newest_fifty_events(site: Live) -> None:
    user = new_user()
    await site.send(*(served(user, site.now_ms) for _ in range(60)))
    seqs = [item["seq"] for item in (await site.client.get(f"/admin/users/{user}")).json()["events"]]
    assert len(seqs) == 50
    assert seqs == sorted(seqs, reverse=True)


@pytest.mark.slow
async def test_freshness_follows_the_cached_values(site: Live, cache_server: EmbeddedServer) -> None:
    user = new_user()
    assert set((await states(site, user)).values()) == {"missing"}
    assert set((await states(site, user)).values()) == {"fresh"}
    await site.send(feedback(user, site.now_ms))
    after = await states(site, user)
    assert after.pop("tip_volume_30d") == "fresh"
    assert set(after.values()) == {"missing"}
    await site.send(served(user, site.now_ms))
    await put(site, cache_server, user, "tip_volume_30d", seq=1)
    assert (await states(site, user))["tip_volume_30d"] == "stale"


@pytest.mark.slow
async def test_freshness_is_null_when_the_cache_is_down(site_without_cache: Live) -> None:
    site, user = site_without_cache, new_user()
    await site.send(served(user, site.now_ms))
    body = (await site.client.get(f"/admin/users/{user}")).json()
    assert {cell["freshness"] for cell in body["features"].values()} == {None}
    assert body["features"]["tip_volume_30d"]["value"] == 1
    rebuilt = await site.client.post(f"/admin/users/{user}/rebuild")
    assert rebuilt.status_code == 200
    assert rebuilt.json()["features"]["tip_volume_30d"]["value"] == 1
    assert (await site.client.delete(f"/admin/users/{user}")).status_code == 204
    assert (await site.features(user))["tip_volume_30d"] == 0


async def test_rebuild_replaces_the_cached_values(site: Live, cache_server: EmbeddedServer) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms), feedback(user, site.now_ms))
    await put(site, cache_server, user, "tip_volume_30d", seq=10**9)
    assert (await site.features(user))["tip_volume_30d"] == 77
    answer = await site.client.post(f"/admin/users/{user}/rebuild")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    rebuilt = answer.json()
    assert rebuilt["user_id"] == user
    assert rebuilt["features"].keys() == set(REGISTRY.names)
    for cell in rebuilt["features"].values():
        assert cell.keys() == {"value", "dtype", "computed_at", "expires_at", "origin"}
        assert cell["origin"] == "computed"
    assert rebuilt["features"]["tip_volume_30d"]["value"] == 1
    read = (await site.client.get(f"/profiles/{user}?detail=true")).json()["features"]
    assert {cell["origin"] for cell in read.values()} == {"cache"}
    assert read["tip_volume_30d"]["value"] == 1


async def test_user_is_cold_when_erased(site: Live, cache_server: EmbeddedServer) -> None:
    user, neighbour = new_user(), new_user()
    events: list[TipEvent] = [served(user, site.now_ms), feedback(user, site.now_ms)]
    await site.send(*events, served(neighbour, site.now_ms))
    await site.features(user)
    await site.filled()
    assert len(cached_keys(cache_server, user)) == len(REGISTRY)
    answer = await site.client.delete(f"/admin/users/{user}")
    assert answer.status_code == 204
    assert answer.content == b""
    assert cached_keys(cache_server, user) == []
    assert (await site.client.get(f"/admin/users/{user}")).json()["events"] == []
    cold = await site.features(new_user())
    assert await site.features(user) == cold
    assert (await site.features(neighbour))["tip_volume_30d"] == 1
    assert (await site.send(*events))["accepted"] == 2
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_audit_trail_does_not_contain_an_erased_user(own_site: Live) -> None:
    user = new_user()
    await own_site.send(served(user, own_site.now_ms))
    await own_site.client.post(f"/admin/users/{user}/rebuild")
    await own_site.client.delete(f"/admin/users/{user}")
    entries = await newest_entries(own_site.service.audit_trail, 10)
    hashed = "user-sha256:" + hashlib.sha256(user.encode()).hexdigest()
    assert [(entry.action, entry.subject, entry.outcome) for entry in entries] == [
        ("erase", hashed, "done, 1 events"),
        ("rebuild", hashed, "done"),
    ]
    assert user not in repr(entries)
    assert rfc3339(entries[0].at_ms) <= rfc3339(own_site.now_ms)


async def test_database_does_not_contain_an_erased_user(own_site: Live) -> None:
    site, user = own_site, new_user()
    await site.send(served(user, site.now_ms), feedback(user, site.now_ms))
    (event, _) = await site.service.consumer.log.unconsumed(site.now_ms + 1, 10)
    await site.service.dead_letters.failed(event.seq, "it failed", "Traceback", site.now_ms, 1)
    several = [{"user_id": "another", "n": 1.50, "ok": True}, {"user_id": user}, {"events": [{"user_id": user}]}, 7]
    for sent in ({"user_id": user}, {"user_id": "another"}, {"deep": [{"user_id": user}]}, several, [several[1]]):
        await site.service.dead_letters.bury_payloads([(json.dumps(sent), "no event")], site.now_ms)
    loose = (json.dumps({"userId": user}), f'"csv,{user},t"', f"no JSON, of {user}")
    for text in ("[1]", "nonsense", *loose):
        await site.service.dead_letters.bury_payloads([(text, "no event")], site.now_ms)
    for body in ({"user_ids": [user]}, {"scope": "all"}):
        run = (await site.client.post("/admin/rebuilds", json=body)).json()["id"]
        await site.service.rebuild_runner.run(run, budget_s=30)
    active = (await site.client.post("/admin/rebuilds", json={"user_ids": ["a", user, "b"]})).json()["id"]
    assert (await site.client.delete(f"/admin/users/{user}")).status_code == 204

    assert user not in contents(site.service.settings.database)
    letters = (await site.client.get("/admin/dead-letters")).json()["dead_letters"]
    assert [item["payload"] for item in letters] == [
        '{"user_id": "another"}',
        '[{"user_id": "another", "n": 1.5, "ok": true},7]',
        "[1]",
        "nonsense",
    ]
    await site.service.rebuild_runner.run(active, budget_s=30)
    status = (await site.client.get(f"/admin/rebuilds/{active}")).json()
    assert (status["state"], status["done"]) == ("completed", 3)


async def test_cached_values_follow_the_protocol(site: Live, cache_server: EmbeddedServer) -> None:
    user = new_user("é %") + "🎯"
    await site.send(served(user, site.now_ms))
    plain = await site.features(user)
    await site.filled()
    names = [REGISTRY[index].name for index in indices(REGISTRY.full_mask)]
    epoch, held = await site.service.cache.read([Cell(user, name) for name in names])
    for name, raw in zip(names, held, strict=True):
        assert ask(cache_server, "GET", key(epoch, Cell(user, name))) == raw
        value = decode(raw)
        assert value is not None
        assert json.loads(value.json) == plain[name]
