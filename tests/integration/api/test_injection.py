"""Ids and names that are SQL, patterns, cache keys, escapes or markup name one user each, and nothing else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from itertools import count
from urllib.parse import quote

import pytest
import pytest_asyncio

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import served
from tests.support.live import JSON, Live, assert_refused, paths, problem
from tests.support.servers import VALKEY, StartServer, keys
from tests.support.site import ServeSite

pytestmark = pytest.mark.both_engines

VICTIM = "victim"
QUOTES = ["' OR '1'='1", '" OR ""="', "victim' --", "'; DROP TABLE tip_views; --"]
STATEMENTS = ["victim'; UPDATE event_log SET user_id = 'victim", "x' UNION SELECT value FROM service --"]
PATTERNS = ["%", "_______", "victi_", "v*", "*", "?", "[a-z]ictim"]
CACHE_KEYS = ["{victim}", "victim}:tip_volume_30d", "}:{victim", "victim:tip_volume_30d"]
REDIS = ["FLUSHALL", "*1\\r\\n$8\\r\\nFLUSHALL", "EVAL \"return redis.call('flushall')\" 0"]
TWINS = ["victim ", " victim", "Victim", "VICTIM", "ｖｉｃｔｉｍ", "victіm", "v\u00edctim", "vi\u0301ctim"]
LITERALS = ["null", "NaN", "-1", "1e9", "0x10"]
HIDDEN = ["vi\u200bctim", "victim\u202e", "\u2028", "\ufffd", "\ufeffvictim"]
ESCAPES = ["%76ictim", "%2576ictim", "victim%00", "\\u0000", "..\\..\\victim", "...", ". ."]
TEMPLATES = ["%s%s%n", "%(user)s", "%b", "{0.__class__}", "{{7*7}}", "${jndi:ldap:"]
COMMANDS = ["$(reboot)", "`reboot`", "| reboot", "<script>alert(1)<", "javascript:alert(1)"]
GROUPS = (QUOTES, STATEMENTS, PATTERNS, CACHE_KEYS, REDIS, TWINS, LITERALS, HIDDEN, ESCAPES, TEMPLATES, COMMANDS)
EVIL = [*(user for group in GROUPS for user in group), "😀" * 128]
INVALID = ["a\r\nFLUSHALL", "\x00", "a\x1b[2J", "a/b", "../victim", "..", ".", "", "a\x7f", "x" * 129]
UNKNOWN = (
    *("tip_volume_30d'; DROP TABLE tip_views; --", "tip_volume_30d; --", "tip_volume_30d\x00", "tip_volume_30d "),
    *("TIP_VOLUME_30D", "\u202etip", "user_id", "*", "__class__", "%(x)s", "%b", "}:{victim", "x" * 8_000),
)
numbers = count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cache(start_server: StartServer) -> EmbeddedServer:
    """Its own cache: the tests list its keys."""
    return start_server(VALKEY)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def place(serve_site: ServeSite, cache: EmbeddedServer) -> AsyncIterator[Live]:
    async with serve_site(cache_url=cache.url, near_users=0) as site:
        yield site


async def volume(site: Live, user: str) -> object:
    found = (await site.features(user))["tip_volume_30d"]
    await site.filled()
    return found


@pytest.mark.slow
async def test_id_that_looks_like_code_names_one_user(place: Live, cache: EmbeddedServer) -> None:
    async def send(user: str, events: int) -> None:
        moment = place.now_ms - 1_000
        await place.send(*(served(user, moment, event_id=f"i-{next(numbers)}") for _ in range(events)))

    for count_of_victim, evil in enumerate(EVIL, start=1):
        await send(VICTIM, 1)
        await send(evil, 2)
        expected = {VICTIM: count_of_victim, evil: 2}
        assert {user: await volume(place, user) for user in expected} == expected
        assert len([key for key in keys(cache) if key.endswith(b":tip_volume_30d")]) >= 2, evil

        batch = await place.client.post("/profiles/batch", json={"user_ids": [evil, VICTIM]})
        assert [item["user_id"] for item in batch.json()["profiles"]] == [evil, VICTIM]
        counts = [item["features"]["tip_volume_30d"] for item in batch.json()["profiles"]]
        assert counts == [2, count_of_victim], evil
        found = (await place.client.get("/admin/users", params={"prefix": evil, "limit": 100})).json()["user_ids"]
        assert evil in found
        assert all(user.startswith(evil) for user in found)

        page = await place.client.get(f"/admin/users/{quote(evil, safe='')}", headers={"Accept": "text/html"})
        assert page.status_code == 200, evil
        assert "<script>alert" not in page.text
        assert "javascript:alert(1)" not in re.findall(r'(?:href|src|action)="([^"]*)"', page.text)
        assert ">49<" not in page.text or evil != "{{7*7}}"

        assert (await place.client.delete(f"/admin/users/{quote(evil, safe='')}")).status_code == 204, evil
        assert {user: await volume(place, user) for user in expected} == {VICTIM: count_of_victim, evil: 0}
    assert (await place.client.get("/admin/users", params={"prefix": VICTIM})).json()["user_ids"] == [VICTIM]
    assert (await place.client.get("/readyz")).json()["checks"]["database"] == "ok"


async def test_id_is_refused_by_every_route_when_it_is_invalid(place: Live) -> None:
    event = {"subject": "signals.tip.served", "event_id": "x", "tip_id": "t", "occurred_at": "2026-01-01T00:00:00Z"}
    for evil in INVALID:
        events = [({**event, "user_id": evil}, "user_id"), ({**event, "user_id": VICTIM, "event_id": evil}, "event_id")]
        await assert_refused(place, "/events", events)
        for path in ("/profiles/batch", "/admin/rebuilds"):
            await assert_refused(place, path, [({"user_ids": [evil]}, "user_ids[0]")])
        if evil not in ("", ".", ".."):
            user = quote(evil, safe="")
            problem(await place.client.get(f"/profiles/{user}"), 422)
            for method, path in (("GET", ""), ("POST", "/rebuild"), ("DELETE", "")):
                problem(await place.client.request(method, f"/admin/users/{user}{path}"), 422)


@pytest.mark.slow
async def test_feature_is_refused_by_every_route_when_it_is_unknown(place: Live) -> None:
    for name in UNKNOWN:
        for query in (f"features={quote(name)}", f"features=tip_volume_30d,{quote(name)}"):
            problem(await place.client.get(f"/profiles/{VICTIM}?{query}"), 400)
        problem(await place.client.get(f"/admin/data-quality/users?state=fresh&feature={quote(name)}"), 400)
        for path, body in (
            ("/profiles/batch", {"user_ids": [VICTIM]}),
            ("/profiles/history", {"rows": [{"user_id": VICTIM, "as_of": "2026-01-01T00:00:00Z"}]}),
            ("/admin/rebuilds", {"user_ids": [VICTIM]}),
            ("/admin/rebuilds", {"scope": "all"}),
            (f"/admin/users/{VICTIM}/rebuild", {}),
        ):
            answer = await place.client.post(path, json={**body, "features": [name]}, headers=JSON)
            assert paths(problem(answer, 422, name)) == ["features"]
            assert len(answer.content) < 2_000, name[:80]


async def test_user_named_as_a_route_is_read_in_a_batch(place: Live) -> None:
    for user in ("batch", "history"):
        assert (await place.client.get(f"/profiles/{user}")).status_code == 405
        answer = await place.client.post("/profiles/batch", json={"user_ids": [user]})
        assert answer.json()["profiles"][0]["user_id"] == user
        assert (await place.client.get(f"/admin/users/{user}")).json()["user_id"] == user
