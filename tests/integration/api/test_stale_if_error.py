"""`Cache-Control: stale-if-error=N`: cached values in place of a 503, while the database does not answer."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import httpx
import pytest
import pytest_asyncio

from app.errors import StoreUnavailable
from app.features.clock import DAY_MS
from app.profiles.online.cache_protocol import CHECK_VALID_S
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.clock import NOW_MS, FakeClock
from tests.support.events import feedback, served
from tests.support.live import Live, problem
from tests.support.logs import Recorder
from tests.support.registry import REGISTRY
from tests.support.site import ServeSite

pytestmark = pytest.mark.both_engines

AGE_S = 60
ACCEPTS = {"Cache-Control": f"stale-if-error={AGE_S}"}
MARK = "profiles; hit; detail=unproven"


OUTAGE = "the database does not answer: disk I/O error"


def fail(*_: object, **__: object) -> NoReturn:
    raise StoreUnavailable(OUTAGE)


class Site(NamedTuple):
    live: Live
    clock: FakeClock

    async def cached(self, *users: str) -> dict[str, Any]:
        """Send an event of each user, and fill the cache; the answered features by user."""
        await self.live.send(*(served(user, self.clock.now_ms()) for user in users))
        features = {user: await self.live.features(user) for user in users}
        await self.live.filled()
        return features

    @contextmanager
    def outage(self, *, computing: bool = False) -> Iterator[None]:
        """The database cannot be asked whether invalidations are owed, nor, unless `computing`, for anything else."""
        service = self.live.service
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.database.state, "rows", fail)
            if not computing:
                patch.setattr(service.database.readers, "one", fail)
            self.pass_check()
            yield
        self.pass_check()

    def pass_check(self) -> None:
        """Let the last query for owed invalidations become too old."""
        self.clock.advance(round(CHECK_VALID_S * 1000) + 1)

    async def get(self, user: str, query: str = "", **headers: str) -> httpx.Response:
        return await self.live.client.get(f"/profiles/{user}{query}", headers=headers or ACCEPTS)

    async def batch(self, *users: str) -> httpx.Response:
        return await self.live.client.post("/profiles/batch", json={"user_ids": users}, headers=ACCEPTS)

    def served_unproven(self) -> float:
        return self.live.service.metrics.collectors.get_sample_value("profiles_unproven_reads_total") or 0.0


@pytest_asyncio.fixture(loop_scope="session")
async def site(serve_site: ServeSite) -> AsyncIterator[Site]:
    clock = FakeClock()
    async with serve_site(clock=clock) as live:
        yield Site(live, clock)


def assert_refused(answer: httpx.Response, header: str = "") -> None:
    """The answer is that of a request without the header."""
    assert problem(answer, 503, header)["detail"] == OUTAGE
    assert answer.headers["retry-after"] == "1"
    assert not {"cache-status", "age"} & answer.headers.keys()


async def test_cached_profile_is_served_and_marked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    features = await site.cached("ann")
    recorder = Recorder()
    monkeypatch.setattr("app.api.profiles.log", recorder)
    site.clock.advance(7_000)
    with site.outage():
        answer = await site.get("ann")
        assert (answer.status_code, answer.json()) == (200, {"user_id": "ann", "features": features["ann"]})
        assert (answer.headers["cache-status"], answer.headers["age"]) == (MARK, "7")
        assert answer.headers["cache-control"] == "no-store"
        detail = (await site.get("ann", "?detail=true")).json()["features"]
        assert {name: one["value"] for name, one in detail.items()} == features["ann"]
        assert {one["origin"] for one in detail.values()} == {"unproven"}
        head = await site.live.client.head("/profiles/ann", headers=ACCEPTS)
        assert (head.status_code, head.headers["cache-status"]) == (200, MARK)
    assert site.served_unproven() == 3
    (line, *_) = recorder.lines
    assert (line["level"], line["event"], line["users"]) == ("warning", "served_unproven", 1)
    assert line["error"] == OUTAGE


async def test_batch_is_served_when_every_value_is_cached(site: Site) -> None:
    features = await site.cached("ann", "bob")
    with site.outage():
        answer = await site.batch("bob", "ann", "bob")
        rows = [(row["user_id"], row["features"]) for row in answer.json()["profiles"]]
        assert rows == [(user, features[user]) for user in ("bob", "ann", "bob")]
        assert (answer.headers["cache-status"], answer.headers["age"]) == (MARK, "0")
        assert_refused(await site.batch("bob", "cid"))
    assert site.served_unproven() == 2


async def test_read_fails_when_a_value_is_not_cached(site: Site) -> None:
    await site.live.client.get("/profiles/ann?features=preferred_hour")
    await site.live.filled()
    with site.outage():
        assert_refused(await site.get("ann"))
        assert (await site.get("ann", "?features=preferred_hour")).headers["cache-status"] == MARK


UNDERSTOOD = (
    "stale-if-error=60",
    "Stale-If-Error=60",
    'stale-if-error="60"',
    "stale-if-error=0000060",
    "no-cache,stale-if-error=60 , max-age=0",
    'x="a, stale-if-error=0", stale-if-error=60',
    "stale-if-error=60, stale-if-error=0",
    "stale-if-error=" + "9" * 5_000,
)
NOT_ALLOWED = (
    "no-store",
    "stale-while-revalidate=60",
    "stale-if-error",
    "stale-if-error=",
    "stale-if-error=-1",
    "stale-if-error=1.5",
    "stale-if-error=1e3",
    "stale-if-error=inf",
    'stale-if-error="60',
    'x="stale-if-error=60"',
    "stale-if-error=0, stale-if-error=60",
    "stale-if-error=x, stale-if-error=60",
)


async def test_header_is_understood(site: Site) -> None:
    await site.cached("ann")
    with site.outage():
        for header in UNDERSTOOD:
            answer = await site.get("ann", **{"Cache-Control": header})
            assert answer.headers.get("cache-status") == MARK, header


async def test_read_fails_when_the_header_does_not_allow_more(site: Site) -> None:
    await site.cached("ann")
    site.clock.advance(1)
    with site.outage():
        for header in NOT_ALLOWED:
            assert_refused(await site.get("ann", **{"Cache-Control": header}), header)
    for header in NOT_ALLOWED:
        assert (await site.get("ann", **{"Cache-Control": header})).status_code == 200, header


async def test_header_is_understood_in_several_lines(site: Site) -> None:
    await site.cached("ann")
    lines = [("Cache-Control", "no-cache"), ("Cache-Control", "stale-if-error=60")]
    with site.outage():
        assert (await site.live.client.get("/profiles/ann", headers=lines)).headers["cache-status"] == MARK


async def test_value_is_served_until_it_is_older_than_asked(site: Site) -> None:
    await site.cached("ann")
    with site.outage():
        site.clock.step_to(NOW_MS + AGE_S * 1000)
        assert (await site.get("ann")).headers["age"] == str(AGE_S)
        site.clock.advance(1)
        assert_refused(await site.get("ann"))
        assert_refused(await site.batch("ann"))


@pytest.mark.slow
async def test_value_is_not_served_when_it_has_expired(site: Site) -> None:
    leaves_ms = NOW_MS + 30_000
    await site.live.send(served("ann", leaves_ms - 30 * DAY_MS), feedback("bob", NOW_MS))
    for user in ("ann", "bob"):
        await site.live.features(user)
    await site.live.filled()
    with site.outage():
        site.clock.step_to(leaves_ms - 1)
        assert (await site.get("ann")).json()["features"]["tip_volume_30d"] == 1
        site.clock.step_to(leaves_ms)
        assert_refused(await site.get("ann"))
        assert (await site.get("bob")).headers["cache-status"] == MARK
        site.clock.advance(REGISTRY.named("completion_rate_30d").ttl_ms)
        assert_refused(await site.get("bob", **{"Cache-Control": "stale-if-error=999999"}))


async def test_read_is_computed_when_only_the_proof_fails(site: Site) -> None:
    features = await site.cached("ann")
    with site.outage(computing=True):
        for answer in (await site.get("ann", "?detail=true"), await site.batch("ann")):
            assert answer.status_code == 200
            assert "cache-status" not in answer.headers
        assert {one["origin"] for one in (await site.get("ann", "?detail=true")).json()["features"].values()} == {
            "computed"
        }
        assert (await site.get("ann")).json()["features"] == features["ann"]
    assert site.served_unproven() == 0


async def test_read_fails_when_an_invalidation_was_known_to_be_owed(site: Site) -> None:
    await site.cached("ann")
    await site.live.service.invalidator.owed.owe(["another-user"], 1)
    site.pass_check()
    assert await site.live.service.reader.gate.distrusted()
    with site.outage():
        assert_refused(await site.get("ann"))


async def test_read_fails_when_the_cache_is_away_too(serve_site: ServeSite, cache: EmbeddedServer) -> None:
    clock = FakeClock()
    async with serve_site(clock=clock, cache_url=cache.url) as live:
        site = Site(live, clock)
        await site.cached("ann")
        with site.outage():
            assert (await site.get("ann")).headers["cache-status"] == MARK
            cache.kill()
            for _ in range(5):  # the circuit opens meanwhile
                assert_refused(await site.get("ann"))


async def test_values_are_proven_again_after_the_outage(site: Site) -> None:
    await site.cached("ann")
    with site.outage():
        assert (await site.get("ann")).headers["cache-status"] == MARK
    answer = await site.get("ann", "?detail=true")
    assert "cache-status" not in answer.headers
    assert {one["origin"] for one in answer.json()["features"].values()} == {"cache"}


async def test_disabled_feature_stays_null_with_its_reason(site: Site) -> None:
    await site.cached("ann")
    await site.live.service.registries.switch("preferred_hour", "ada", "it is wrong", NOW_MS, on=False)
    with site.outage():
        features = (await site.get("ann", "?detail=true")).json()["features"]
        assert (features["preferred_hour"]["value"], features["preferred_hour"]["origin"]) == (None, "computed")
        assert "it is wrong" in features["preferred_hour"]["error"]
        assert features["tip_volume_30d"]["origin"] == "unproven"


async def test_cache_is_not_asked_when_all_wanted_features_are_disabled(site: Site) -> None:
    reader = site.live.service.reader
    await site.cached("ann")
    await site.live.service.registries.switch("preferred_hour", "ada", "it is wrong", NOW_MS, on=False)
    index = REGISTRY.names.index("preferred_hour")
    with site.outage():
        found = await reader.read_unproven({"bob": 1 << index}, AGE_S)
    assert found is not None
    assert found["bob"][index].json == b"null"


async def test_past_moments_fail_as_before(site: Site) -> None:
    await site.cached("ann")
    rows = {"rows": [{"user_id": "ann", "as_of": "2026-04-25T11:00:00Z"}]}
    with site.outage():
        assert_refused(await site.get("ann", "?as_of=2026-04-25T11:00:00Z"))
        assert_refused(await site.live.client.post("/profiles/history", json=rows, headers=ACCEPTS))
