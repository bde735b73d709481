"""Ids and names that would be commands, patterns, paths or markup elsewhere are names here, each of one user alone."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from itertools import count
from urllib.parse import quote

import pytest
import pytest_asyncio

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import served
from tests.support.live import JSON, Live, paths, problem, raw_status
from tests.support.registry import REGISTRY
from tests.support.servers import VALKEY, StartServer, ask, keys
from tests.support.site import ServeSite

VICTIM = "victim"
EVIL = [
    "'; DROP TABLE tip_views; --",
    "' OR '1'='1",
    '" OR ""="',
    "victim' --",
    "victim'; UPDATE event_log SET user_id = 'victim",
    "x' UNION SELECT value FROM service --",
    "%",
    "_______",
    "victi_",
    "v*",
    "*",
    "?",
    "[a-z]ictim",
    "{victim}",
    "victim}:tip_volume_30d",
    "}:{victim",
    "victim:tip_volume_30d",
    "victim ",
    " victim",
    "Victim",
    "VICTIM",
    "ｖｉｃｔｉｍ",
    "victіm",
    "vi\u200bctim",
    "victim\u202e",
    "v\u00edctim",
    "vi\u0301ctim",
    "%76ictim",
    "%2576ictim",
    "victim%00",
    "%s%s%n",
    "%(user)s",
    "%b",
    "{0.__class__}",
    "{{7*7}}",
    "${jndi:ldap:",
    "$(reboot)",
    "`reboot`",
    "| reboot",
    "<script>alert(1)<",
    "javascript:alert(1)",
    "\\u0000",
    "..\\..\\victim",
    "...",
    ". .",
    "FLUSHALL",
    "*1\\r\\n$8\\r\\nFLUSHALL",
    "EVAL \"return redis.call('flushall')\" 0",
    "null",
    "NaN",
    "-1",
    "1e9",
    "0x10",
    "\u2028",
    "\ufffd",
    "\ufeffvictim",
    "😀" * 128,
]
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


@pytest.mark.parametrize("evil", EVIL)
async def test_id_is_one_users_alone_whatever_it_says(place: Live, cache: EmbeddedServer, evil: str) -> None:
    async def send(user: str, events: int) -> None:
        moment = place.now_ms - 1_000
        await place.send(*(served(user, moment, event_id=f"i-{next(numbers)}") for _ in range(events)))

    known = await volume(place, VICTIM)
    await send(VICTIM, 1)
    expected = {VICTIM: int(str(known)) + 1, evil: 2}
    await send(evil, 2)
    assert {user: await volume(place, user) for user in expected} == expected
    held = set(keys(cache))
    assert len([key for key in held if key.endswith(b":tip_volume_30d")]) >= 2

    batch = await place.client.post("/profiles/batch", json={"user_ids": [evil, VICTIM]})
    assert [item["user_id"] for item in batch.json()["profiles"]] == [evil, VICTIM]
    assert [item["features"]["tip_volume_30d"] for item in batch.json()["profiles"]] == [2, expected[VICTIM]]
    found = await place.client.get("/admin/users", params={"prefix": evil, "limit": 100})
    assert evil in found.json()["user_ids"]
    assert all(user.startswith(evil) for user in found.json()["user_ids"])

    page = await place.client.get(f"/admin/users/{quote(evil, safe='')}", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "<script>alert" not in page.text
    assert "javascript:alert(1)" not in re.findall(r'(?:href|src|action)="([^"]*)"', page.text)
    assert ">49<" not in page.text or evil != "{{7*7}}"

    assert (await place.client.delete(f"/admin/users/{quote(evil, safe='')}")).status_code == 204
    assert {user: await volume(place, user) for user in expected} == {VICTIM: expected[VICTIM], evil: 0}
    assert await place.client.get("/admin/rebuilds") is not None
    assert ask(cache, "PING") in (True, b"PONG", "PONG")


@pytest.mark.parametrize(
    "evil", ["a\r\nFLUSHALL", "\x00", "a\x1b[2J", "a/b", "../victim", "..", ".", "", "a\x7f", "x" * 129]
)
async def test_id_is_refused_everywhere_when_it_breaks_the_rules(place: Live, evil: str) -> None:
    await place.features(VICTIM)
    await place.filled()
    event = {"subject": "signals.tip.served", "event_id": "x", "tip_id": "t", "occurred_at": "2026-01-01T00:00:00Z"}
    for body in ({**event, "user_id": evil}, {**event, "user_id": VICTIM, "event_id": evil}):
        problem(await place.client.post("/events", json=body), 422)
    problem(await place.client.post("/profiles/batch", json={"user_ids": [evil]}), 422)
    problem(await place.client.post("/admin/rebuilds", json={"user_ids": [evil]}), 422)
    if evil not in ("", ".", ".."):
        target = f"/profiles/{quote(evil, safe='')}"
        problem(await place.client.get(target), 422)
        problem(await place.client.delete(target.replace("profiles", "admin/users")), 422)


@pytest.mark.parametrize(
    "name",
    [
        "tip_volume_30d'; DROP TABLE tip_views; --",
        "tip_volume_30d; --",
        "user_id",
        "*",
        "__class__",
        "tip_volume_30d\x00",
        "TIP_VOLUME_30D",
        "tip_volume_30d ",
        "%(x)s",
        "%b",
        "}:{victim",
        "x" * 8_000,
        "\u202etip",
    ],
)
async def test_feature_is_refused_everywhere_when_it_is_not_in_the_registry(place: Live, name: str) -> None:
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
        assert paths(problem(answer, 422)) == ["features"]
        assert len(answer.content) < 2_000


@pytest.mark.parametrize(
    "target",
    [
        b"/profiles/%76ictim",
        b"/profiles/%56ictim",
        b"/profiles/victim%20",
        b"/profiles/victim%C2%A0",
        b"/profiles/victim+",
        b"/profiles/victim;x=y",
        b"/profiles/victim%3Fdetail=true",
        b"/profiles/victim%23",
        b"/profiles/%2525",
        b"/profiles/%C3%A9",
    ],
)
async def test_escapes_of_a_path_are_decoded_once(place: Live, target: bytes) -> None:
    expected = {
        b"/profiles/%76ictim": "victim",
        b"/profiles/%56ictim": "Victim",
        b"/profiles/victim%20": "victim ",
        b"/profiles/victim%C2%A0": "victim\u00a0",
        b"/profiles/victim+": "victim+",
        b"/profiles/victim;x=y": "victim;x=y",
        b"/profiles/victim%3Fdetail=true": "victim?detail=true",
        b"/profiles/victim%23": "victim#",
        b"/profiles/%2525": "%25",
        b"/profiles/%C3%A9": "é",
    }
    status, body = await raw_status(place, target)
    assert (status, body["user_id"]) == (200, expected[target])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/profiles/%", 400),
        (b"/profiles/%4", 400),
        (b"/profiles/%zz", 400),
        (b"/profiles/%u0041", 400),
        (b"/profiles/%FF", 400),
        (b"/profiles/%C0%AE%C0%AE", 400),
        (b"/profiles/%ED%A0%80", 400),
        (b"/profiles/%F4%90%80%80", 400),
        (b"/profiles/a%2Fb", 422),
        (b"/profiles/a%2fb", 422),
        (b"/profiles/..%2f..%2fetc%2fpasswd", 422),
        (b"/profiles/%00", 422),
        (b"/profiles/%0d%0aX:y", 422),
        (b"/profiles/%2e", 422),
        (b"/profiles/%2e%2E", 422),
        (b"/profiles/..", 422),
        (b"/profiles/../admin/users/victim", 404),
        (b"/profiles//victim", 404),
        (b"//profiles/victim", 404),
        (b"/profiles%2Fvictim", 422),
        (b"/PROFILES/victim", 404),
        (b"/profiles/victim?features=%ff", 400),
        (b"/profiles/victim?features=%", 400),
        (b"/profiles/victim?%66eatures=nope", 400),
        (b"/profiles/victim?features[]=a", 400),
        (b"/profiles/victim?features=tip_volume_30d&features=tip_volume_30d", 400),
        (b"/profiles/victim?features=tip_volume_30d;detail=true", 400),
        (b"/profiles/victim?detail=2", 400),
        (b"/admin/static/..%2fassets.py", 422),
        (b"/admin/static/%2e%2e/assets.py", 404),
        (b"/admin/static//etc/passwd", 404),
        (b"/schema/assets/..%5c..%5cx", 404),
    ],
)
async def test_path_is_refused_when_its_escapes_are_odd(place: Live, target: bytes, expected: int) -> None:
    assert (await raw_status(place, target))[0] == expected


@pytest.mark.parametrize("user", ["batch", "history"])
async def test_user_called_as_a_route_is_read_in_a_batch_only(place: Live, user: str) -> None:
    assert (await place.client.get(f"/profiles/{user}")).status_code == 405
    answer = await place.client.post("/profiles/batch", json={"user_ids": [user]})
    assert answer.json()["profiles"][0]["user_id"] == user
    assert (await place.client.get(f"/admin/users/{user}")).json()["user_id"] == user


async def test_nothing_was_lost_by_all_that(place: Live, cache: EmbeddedServer) -> None:
    assert set((await place.features(VICTIM)).keys()) == set(REGISTRY.names)
    assert (await place.client.get("/admin/users", params={"prefix": VICTIM})).json()["user_ids"] == [VICTIM]
    assert (await place.client.get("/readyz")).json()["checks"]["database"] == "ok"
    await place.filled()
    assert keys(cache)
