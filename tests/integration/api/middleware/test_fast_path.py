"""The fast path against the documented route: two sites over one database and cache, one without the fast path.

Both must give the same status, headers and body for every request, and count it in the same way.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from litestar.types import Receive, Scope, Send

from app.errors import StoreFull
from app.settings import Settings
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import feedback, served
from tests.support.live import API_KEYS, KEYS, Live, as_caller, fresh_database, live, new_user, problem
from tests.support.registry import FEATURES, REGISTRY
from tests.support.waiting import PATIENCE_S, eventually

USERS = ["ada", "Grace.Hopper", "a@b.c", "user:1~x", "-", "...", "_" * 128, "batches"]
ODD = [
    "batch", "history", ".", "..", ".a", "a%2Fb", "%61da", "ad%E4", "%C3%A9", "a%20b", "a+b", "x" * 129, "", "ada/",
    "/ada", "a;b", "a,b", "a=b", "a$b", "a%", "a%zz", "a%00", "a%0Ab", "%F0%9F%8C%8D", "a*b", "(a)", "a!b", "a&b",
    "ada/rebuild",
]  # fmt: skip
NAMES = [*REGISTRY.names, "nonsense", "", " ", "Tip_Volume_30d", "tip%5Fvolume_30d"]
QUERIES = [
    "",
    "detail=true",
    "detail=false",
    "detail=maybe",
    "as_of=2026-01-01",
    "nope=1",
    "&",
    "features",
    "FEATURES=a",
]
GOOD_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")


class Ask(NamedTuple):
    target: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""

    def encoded(self) -> bytes:
        lines = [f"{self.method} {self.target} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return ("\r\n".join(lines) + "\r\n\r\n" + self.body).encode("latin-1")

    @property
    def own_id(self) -> str | None:
        ids = [value for name, value in self.headers if name.lower() == "x-request-id" and GOOD_ID.fullmatch(value)]
        return ids[0] if ids else None


class Told(NamedTuple):
    """An answer, without the parts that differ between two equal requests."""

    status: int
    headers: list[tuple[str, str]]
    body: object


features = st.lists(st.sampled_from(NAMES), max_size=4).map(lambda names: "features=" + ",".join(names))
queries = st.one_of(
    st.just(None), st.just(None), st.sampled_from(QUERIES), features, st.lists(features, max_size=2).map("&".join)
)
header = st.one_of(
    st.sampled_from([("X-API-Key", key) for key in [*KEYS.values(), "", "x" * 600, "\xe9"]]),
    st.sampled_from([("X-Request-Id", value) for value in ["mine-1", "a b", "x" * 65, "", "yours_2"]]),
    st.sampled_from(
        [("Accept", "text/html"), ("Accept-Encoding", "gzip"), ("Expect", "100-continue"), ("X-A", "\xff")]
    ),
    st.sampled_from([("Host", "localhost"), ("host", "elsewhere.example")]),
    st.sampled_from([("Origin", "http://localhost"), ("Origin", "https://elsewhere.example"), ("Origin", "null")]),
    st.sampled_from([("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")]),
    st.just(("Cache-Control", "stale-if-error=60")),
)
good_key = st.just((("x-api-key", KEYS["reader"]),))


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    """Mostly requests that the fast path answers, with every kind of fault."""
    user = draw(st.one_of(st.sampled_from(USERS), st.sampled_from(ODD), st.text("abZ.-~:@_%2F?#", max_size=12)))
    query = draw(queries)
    headers = draw(st.one_of(good_key, st.lists(header, max_size=4).map(tuple), good_key))
    body = draw(st.sampled_from(["", "", "", "{}"]))
    if body:
        headers = (*headers, ("Content-Length", str(len(body))))
    method = draw(st.sampled_from(["GET"] * 8 + ["HEAD", "POST", "OPTIONS", "DELETE", "get"]))
    return Ask(f"/profiles/{user}" + (f"?{query}" if query is not None else ""), method, headers, body)


bodies = st.one_of(
    st.fixed_dictionaries(
        {"user_ids": st.lists(st.sampled_from([*USERS, "ann", "é", "\x00", "a/b", "", "x" * 129]), max_size=9)},
        optional={"features": st.one_of(st.none(), st.lists(st.sampled_from(NAMES), max_size=3)), "more": st.just(1)},
    ).map(json.dumps),
    st.just(json.dumps({"user_ids": USERS * 100})),
    st.just(json.dumps({"user_ids": [f"u{number}" for number in range(1_001)]})),
    st.sampled_from(
        ["{}", "[]", " ", "{", "null", '{"user_ids": 1}', '{"user_ids": ["\xff"]}', "[" * 2_000, '{"user_ids":["a"]} x',
         '{"user_ids":["a"],"user_ids":["b"]}', '{"user_ids":[1]}', ' {"user_ids" : ["ada" ] } ']
    ),
)  # fmt: skip
kinds = st.sampled_from(
    ["application/json"] * 6 + ["application/json; charset=utf-8", "text/plain", "", "Application/JSON"]
)


@st.composite
def batches(draw: st.DrawFn) -> Ask:
    body = draw(bodies)
    headers = [("Content-Type", draw(kinds)), ("Content-Length", str(len(body.encode("latin-1", "replace"))))]
    headers += draw(st.one_of(good_key, st.lists(header, max_size=2).map(tuple), good_key))
    if draw(st.integers(0, 9)) == 0:
        headers.append(("Content-Encoding", "gzip"))
    query = draw(st.sampled_from([""] * 6 + ["?", "?a=b"]))
    return Ask("/profiles/batch" + query, draw(st.sampled_from(["POST"] * 9 + ["PUT"])), tuple(headers), body)


def mostly(good: st.SearchStrategy[Any], *odd: object) -> st.SearchStrategy[Any]:
    return st.integers(0, 29).flatmap(lambda number: good if number != 13 else st.sampled_from(odd))


numbers = st.one_of(st.integers(0, 400), st.floats(0, 50))
tips = st.fixed_dictionaries(
    {
        "id": mostly(st.one_of(st.just("é"), st.integers(0, 999).map(str)), "a/b", "", 1),
        "features": st.fixed_dictionaries(
            {
                "is_overdue": mostly(st.booleans(), 1),
                "task_age_days": mostly(numbers, -1, "1"),
                "priority": mostly(numbers, None),
            }
        ),
    }
)
distinct_tips = st.lists(tips, min_size=1, max_size=5, unique_by=lambda tip: tip["id"])
tip_lists = st.one_of(distinct_tips, distinct_tips, distinct_tips, st.lists(tips, max_size=5))
profile_features = st.fixed_dictionaries(
    {},
    optional={
        "preferred_hour": mostly(st.sampled_from([9, 9.0, None]), 9.5),
        "completion_rate_30d": mostly(numbers, "0.5"),
        "mood": st.just("good"),
    },
)
decisions = st.fixed_dictionaries(
    {
        "user_id": mostly(st.sampled_from([*USERS, "ann"]), "a/b", "", "\x00"),
        "candidates": tip_lists,
    },
    optional={
        "request_id": mostly(
            st.one_of(st.uuids().map(str), st.uuids().map(str), st.sampled_from(["known", None])), ".."
        ),
        "context": st.sampled_from(
            [None, {}, {"at": None}, {"at": "2026-04-25T08:30:00+02:00"}] * 9 + [{"at": "8:30"}]
        ),
        "profile_features": mostly(st.one_of(st.none(), profile_features), []),
        "explore": mostly(st.booleans(), None),
    },
).map(json.dumps)


events = st.fixed_dictionaries(
    {
        "subject": mostly(st.just("signals.tip.served"), "signals.tip", 1),
        "event_id": mostly(st.one_of(st.uuids().map(str), st.sampled_from(["known", "known-2"])), "", "a/b"),
        "user_id": mostly(st.sampled_from(USERS), ".."),
        "tip_id": mostly(st.sampled_from(["tip", "é"]), None),
        "occurred_at": mostly(st.just(datetime.now(UTC).isoformat()), "2001-01-01T00:00:00Z", "now"),
    },
    optional={"decision_id": st.sampled_from(["d", None])},
)
deliveries = st.one_of(events.map(json.dumps), st.lists(events, max_size=4).map(json.dumps))


def posts(path: str, key: str, sent: st.SearchStrategy[str]) -> st.SearchStrategy[Ask]:
    """Mostly what the fast path answers."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Ask:
        body = draw(bodies if draw(st.integers(0, 9)) == 7 else sent)
        headers = [("Content-Type", draw(kinds)), ("Content-Length", str(len(body.encode("latin-1", "replace"))))]
        good = st.just((("x-api-key", KEYS[key]),))
        headers += draw(st.one_of(good, st.lists(header, max_size=2).map(tuple), good))
        query = draw(st.sampled_from([""] * 6 + ["?", "?a=b"]))
        return Ask(path + query, draw(st.sampled_from(["POST"] * 9 + ["PUT"])), tuple(headers), body)

    return drawn()


async def told(site: Live, ask: Ask) -> Told:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(ask.encoded())
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    while answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = sorted((name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    given = [value for name, value in headers if name == "x-request-id"]
    assert len(given) == (0 if not given and status.endswith("400 Bad Request") else 1), headers
    if ask.own_id is not None and given:
        assert given == [ask.own_id]
    kept = [(name, value) for name, value in headers if name not in ("date", "x-request-id")]
    if "detail=true" in ask.target.partition("#")[0] and status.endswith("200 OK"):
        kept = [item for item in kept if item[0] != "content-length"]
        return Told(int(status.split()[1]), kept, _timeless(body) if body else body)  # empty for HEAD
    if ask.target.startswith("/score") and status.endswith("200 OK") and not json.loads(ask.body).get("request_id"):
        kept = [item for item in kept if item[0] != "content-length"]
        return Told(int(status.split()[1]), kept, await _without_chance(site, body))
    if ask.target.startswith("/events") and status.endswith("202 Accepted"):
        receipt = json.loads(body)
        assert msgspec.json.encode(receipt) == body
        # What is new on the first site is a duplicate on the second.
        return Told(202, kept, (receipt.pop("accepted") + receipt.pop("duplicates"), receipt))
    return Told(int(status.split()[1]), kept, body)


def _timeless(body: bytes) -> object:
    answer = json.loads(body)
    for feature in answer["features"].values():
        for name in ("computed_at", "expires_at", "origin"):
            del feature[name]
    return answer


async def _without_chance(site: Live, body: bytes) -> object:
    """A decision without what its random numbers decide, which must be as stored. One with a `request_id` is the same
    on both sites, so its bytes are compared."""
    answer = json.loads(body)
    assert msgspec.json.encode(answer) == body
    stored = await site.service.bandit.scorer.explain(answer["decision_id"])
    decision = stored[0]
    probabilities = {item["id"]: item.pop("probability") for item in answer["ranking"]}
    assert probabilities == dict(
        zip((item.id for item in decision.candidates), decision.ranking.pi.tolist(), strict=True)
    )
    assert answer.pop("chosen_id") == decision.chosen_id
    del answer["decision_id"]
    return answer


def counted(site: Live) -> dict[tuple[str, ...], int]:
    (family,) = site.service.metrics.request_seconds.collect()
    counts = (sample for sample in family.samples if sample.name.endswith("_count"))
    return {tuple(sample.labels.values()): int(sample.value) for sample in counts}


async def told_and_counted(site: Live, ask: Ask) -> tuple[Told, set[tuple[str, ...]]]:
    before = counted(site)
    answer = await told(site, ask)
    # A request is counted after its answer was sent; one that the server itself refuses is not.
    await eventually(lambda: counted(site) != before or answer.status == 400)
    return answer, {labels for labels, count in counted(site).items() if count != before.get(labels, 0)}


class Pair(NamedTuple):
    site: Live
    reference: Live


def pair_settings(database: Path, cache: EmbeddedServer, queue: EmbeddedServer, timeout_ms: int = 5_000) -> Settings:
    return Settings(
        features=FEATURES,
        database=database,
        cache_url=cache.url,
        queue_url=queue.url,
        cache_timeout_ms=timeout_ms,
        api_keys=API_KEYS,
    )


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pair(
    migrated_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
    cache_server: EmbeddedServer,
    queue_server: EmbeddedServer,
) -> AsyncIterator[Pair]:
    database = fresh_database(migrated_template, tmp_path_factory.mktemp("pair"))
    chosen = pair_settings(database, cache_server, queue_server)
    async with live(chosen) as site, live(chosen, hit_path=False) as reference:
        site.client.headers.update(as_caller("admin"))
        events = [event for user in USERS for event in (served(user, site.now_ms), feedback(user, site.now_ms))]
        await site.send(*events)
        for user in USERS[::2]:
            await site.features(user)
        await site.filled()
        yield Pair(site, reference)


KEY = (("x-api-key", KEYS["reader"]),)
DECISION = {
    "user_id": "ada",
    "candidates": [{"id": "a", "features": {"is_overdue": True, "task_age_days": 1, "priority": 2}}],
}


@pytest.mark.slow
@settings(max_examples=4 * settings().max_examples, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(asks(), batches(), posts("/score", "reader", decisions), posts("/events", "writer", deliveries)))
@example(Ask("/profiles/ada", headers=KEY))
@example(Ask("/profiles/ada?features=tip_volume_30d,preferred_hour", headers=KEY))
@example(Ask("/profiles/ada?detail=true", "HEAD", headers=KEY))
@example(Ask("/profiles/ada", headers=(*KEY, ("X-API-Key", KEYS["stranger"]))))
@example(Ask("/profiles/ada", headers=(("X-API-Key", KEYS["stranger"]), *KEY)))
@example(Ask("/profiles/ada", headers=(*KEY, ("X-Request-Id", "a b"), ("X-Request-Id", "second"))))
async def test_fast_path_answers_as_the_documented_route(pair: Pair, ask: Ask) -> None:
    assert await told_and_counted(pair.site, ask) == await told_and_counted(pair.reference, ask)


async def test_plain_requests_do_not_reach_the_framework(pair: Pair) -> None:
    async def forbidden(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the fast path passed the request on")

    handler = pair.site.app.asgi_handler
    inner, handler.inner = handler.inner, forbidden  # type: ignore[attr-defined]
    try:
        asked, headers = {"user_ids": [*USERS, USERS[0]]}, {"Cache-Control": "stale-if-error=60"}
        answer = await pair.site.client.post("/profiles/batch", json=asked, headers=headers)
        assert [profile["user_id"] for profile in answer.json()["profiles"]] == [*USERS, USERS[0]]
        answer = await pair.site.client.post("/score", json=DECISION)
        assert (answer.status_code, answer.json()["chosen_id"]) == (200, "a")
        await pair.site.send(served("ada", pair.site.now_ms))
        for user in (user for user in USERS if not user.startswith(".")):
            for query in ("", "?features=tip_volume_30d", "?features=tip_volume_30d,preferred_hour"):
                answer = await pair.site.client.get(f"/profiles/{user}{query}")
                assert answer.status_code == 200
                assert answer.json()["user_id"] == user
    finally:
        handler.inner = inner  # type: ignore[attr-defined]


@pytest.mark.parametrize(("error", "status"), [(StoreFull("no room"), 507), (ValueError("a defect"), 500)])
async def test_failed_decision_is_not_tried_again(
    own_site: Live, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    writes: list[Exception] = []

    async def write(*_: object, **__: object) -> None:
        writes.append(error)
        raise error

    with monkeypatch.context() as failing:
        failing.setattr(own_site.service.database, "write", write)
        answer = await own_site.client.post("/score", json=DECISION, headers={"X-Request-Id": "mine"})
    problem(answer, status)
    assert (len(writes), answer.headers["x-request-id"]) == (1, "mine")
    await eventually(lambda: ("POST", "/score", str(status)) in counted(own_site))
    assert (await own_site.client.post("/score", json=DECISION)).status_code == 200


async def test_both_paths_read_the_events_of_either(pair: Pair) -> None:
    before = (await pair.site.features("ada"))["tip_volume_30d"]
    pair.reference.client.headers.update(as_caller("admin"))
    for number, door in enumerate([pair.site, pair.reference] * 5, start=1):
        await door.send(served("ada", door.now_ms))
        ours, reference = [await told(site, Ask("/profiles/ada", headers=KEY)) for site in pair]
        assert ours == reference
        assert json.loads(str(ours.body, "utf-8"))["features"]["tip_volume_30d"] == before + number  # type: ignore[call-overload]


async def near(site: Live, user: str) -> bytes:
    """Read until the site answers from its local cache; the answer."""
    metrics = site.service.metrics
    async with asyncio.timeout(PATIENCE_S):
        while True:
            before = metrics.collectors.get_sample_value("profiles_near_hits_total")
            answer = await told(site, Ask(f"/profiles/{user}", headers=KEY))
            await site.filled()
            if metrics.collectors.get_sample_value("profiles_near_hits_total") != before:
                assert isinstance(answer.body, bytes)
                return answer.body


@pytest.mark.parametrize("how", ["erased", "rebuilt", "rebuilt by a run"])
async def test_local_cache_is_not_stale_when_another_process_changes_a_user(pair: Pair, how: str) -> None:
    site, admin = pair
    admin.client.headers.update(as_caller("admin"))
    user = new_user()
    await site.send(served(user, site.now_ms))
    assert b'"tip_volume_30d":1' in await near(site, user)
    if how == "erased":
        assert (await admin.client.delete(f"/admin/users/{user}")).status_code == 204
    else:
        delete = "DELETE FROM tip_views WHERE user_id = ?"
        await admin.service.database.write(lambda connection: connection.execute(delete, (user,)), of=())
        assert b'"tip_volume_30d":1' in await near(site, user)
    if how == "rebuilt":
        assert (await admin.client.post(f"/admin/users/{user}/rebuild")).status_code == 200
    elif how == "rebuilt by a run":
        run = (await admin.client.post("/admin/rebuilds", json={"user_ids": [user]})).json()
        assert await admin.service.rebuild_runner.run(run["id"], 5)
        assert (await admin.client.get(f"/admin/rebuilds/{run['id']}")).json()["state"] == "completed"
    answer = await told(site, Ask(f"/profiles/{user}", headers=KEY))
    assert b'"tip_volume_30d":0' in answer.body  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["paused", "killed"])
async def test_answers_are_the_same_when_the_cache_fails(
    migrated_template: Path, tmp_path: Path, own_server: EmbeddedServer, queue_server: EmbeddedServer, trouble: str
) -> None:
    chosen = pair_settings(fresh_database(migrated_template, tmp_path), own_server, queue_server, timeout_ms=100)
    asked = [
        Ask(f"/profiles/{user}{query}", headers=KEY)
        for user in USERS
        for query in ("", "?features=tip_volume_30d", "?features=nope")
    ]
    async with live(chosen) as site, live(chosen, hit_path=False) as reference:
        site.client.headers.update(as_caller("admin"))
        await site.send(*(served(user, site.now_ms) for user in USERS))
        well = [await told(reference, ask) for ask in asked]
        if trouble == "paused":
            own_server.signal(signal.SIGSTOP)
        else:
            own_server.kill()
        for place in (site, reference):
            assert [await told(place, ask) for ask in asked] == well
        assert not site.service.cache.available
        if trouble == "paused":
            own_server.signal(signal.SIGCONT)
        else:
            own_server.start()
        await eventually(lambda: site.service.cache.available)
        assert [await told(site, ask) for ask in asked] == well
