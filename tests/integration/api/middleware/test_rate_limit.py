"""Limits per caller: off by default, a token bucket for each key or address, and headers with the rest."""

import asyncio
import re

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.middleware import rate_limit
from app.api.middleware.rate_limit import TokenBuckets
from tests.support.clock import FakeClock
from tests.support.events import body, served
from tests.support.live import API_KEYS, JSON, Live, as_caller, problem
from tests.support.site import ServeSite

PAUSES = st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=120)


@given(per_s=st.integers(1, 50), burst=st.integers(1, 30), pauses=PAUSES)
def test_requests_of_any_period_are_bounded_by_burst_and_rate(per_s: int, burst: int, pauses: list[float]) -> None:
    clock = FakeClock()
    buckets = TokenBuckets(per_s, burst, clock.monotonic)
    let_in: list[float] = []
    for pause in pauses:
        clock.monotonic_s += pause
        if buckets.take("one")[0]:
            let_in.append(clock.monotonic_s)
    for first, begin in enumerate(let_in):
        for last in range(first, len(let_in)):
            assert last - first + 1 <= burst + (let_in[last] - begin) * per_s + 1e-6


@given(per_s=st.integers(1, 50), burst=st.integers(1, 30), pauses=PAUSES)
def test_request_is_allowed_after_the_announced_wait(per_s: int, burst: int, pauses: list[float]) -> None:
    clock = FakeClock()
    buckets = TokenBuckets(per_s, burst, clock.monotonic)
    for pause in pauses:
        clock.monotonic_s += pause
        allowed, tokens = buckets.take("one")
        if not allowed:
            clock.monotonic_s += (1 - tokens) / per_s + 1e-6
            allowed, tokens = buckets.take("one")
            assert allowed
        assert 0 <= tokens < burst
        for _ in range(int(tokens)):
            assert buckets.take("one")[0]
        assert not buckets.take("one")[0]
        clock.monotonic_s += burst / per_s + 1e-6
        assert buckets.take("one") == (True, burst - 1)


def test_bucket_does_not_fill_when_the_clock_goes_back() -> None:
    clock = FakeClock()
    buckets = TokenBuckets(5, 2, clock.monotonic)
    assert [buckets.take("one")[0] for _ in range(3)] == [True, True, False]
    assert buckets.take("two") == (True, 1)
    clock.monotonic_s -= 100
    assert not buckets.take("one")[0]
    assert buckets.take("two")[0], "a caller loses no token either"


def test_callers_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "CALLERS", 3)
    buckets = TokenBuckets(1, 1, FakeClock().monotonic)
    for name in "abcd":
        assert buckets.take(name)[0]
    assert not buckets.take("d")[0]
    assert buckets.take("a")[0], "the oldest caller was forgotten"


def left(answer: httpx.Response) -> int:
    assert answer.headers["ratelimit-policy"] == '"requests";q=3;w=3'
    found = re.fullmatch(r'"requests";r=(\d+);t=([0-3])', answer.headers["ratelimit"])
    assert found is not None, answer.headers["ratelimit"]
    assert int(found[2]) == 3 - int(found[1]), "`t` is the time until the bucket is full, at one token per second"
    return int(found[1])


@pytest.mark.slow
async def test_only_the_key_that_sends_too_many_is_limited(serve_site: ServeSite) -> None:
    async with serve_site(api_keys=API_KEYS, clock=FakeClock(), rate_limit=1, rate_burst=3) as site:
        reader, admin = as_caller("reader"), as_caller("admin")
        answers = [await site.client.get("/profiles/u", headers=reader) for _ in range(2)]
        answers += await asyncio.gather(*(site.client.get("/profiles/u", headers=reader) for _ in range(12)))
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert left(answers[0]) == 2
        assert "too many requests" in problem(refused, 429)["detail"]
        assert refused.headers["retry-after"] == "1"
        assert left(refused) == 0
        assert (await site.client.get("/profiles/u", headers=admin)).status_code == 200
        for path in ("/healthz", "/readyz", "/metrics"):
            answer = await site.client.get(path, headers=reader)
            assert answer.status_code == 200
            assert "ratelimit" not in answer.headers
        assert _limited(site, "reader") == sum(answer.status_code == 429 for answer in answers)


async def test_unknown_keys_are_limited_by_address(serve_site: ServeSite) -> None:
    async with serve_site(api_keys=API_KEYS, clock=FakeClock(), rate_limit=1, rate_burst=3) as site:
        get, guesses = site.client.get, [{"X-API-Key": f"guess {number}"} for number in range(12)]
        answers = await asyncio.gather(*(get("/profiles/u", headers=guess) for guess in guesses))
        assert {answer.status_code for answer in answers} == {401, 429}
        keyless = await asyncio.gather(*(get("/profiles/u") for _ in guesses))
        problem(next(answer for answer in keyless if answer.status_code != 401), 429)
        assert (await site.client.get("/profiles/u", headers=as_caller("reader"))).status_code == 200
        event = body(served("u", site.now_ms))
        floods = await asyncio.gather(
            *(site.client.post("/events", content=event * 10_000, headers=JSON) for _ in range(6))
        )
        problem(next(answer for answer in floods if answer.status_code != 401), 429)
        assert _limited(site, "without a key") >= 2


async def test_address_is_not_limited_by_requests_of_another(serve_site: ServeSite) -> None:
    async with serve_site(api_keys=API_KEYS, clock=FakeClock(), rate_limit=1, rate_burst=3) as site:
        answers = await asyncio.gather(*(site.client.get("/profiles/u") for _ in range(12)))
        assert {answer.status_code for answer in answers} == {401, 429}
        elsewhere = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
        async with httpx.AsyncClient(base_url=site.url, transport=elsewhere) as another:
            assert (await another.get("/profiles/u")).status_code == 401


@pytest.mark.slow
async def test_limits_are_not_documented_when_there_are_none(site: Live) -> None:
    answer = await site.client.get("/profiles/u")
    assert not {"ratelimit", "ratelimit-policy"} & answer.headers.keys()
    document = (await site.client.get("/schema/openapi.json")).json()
    assert "429" not in document["paths"]["/events"]["post"]["responses"]
    assert "408" in document["paths"]["/events"]["post"]["responses"]


@pytest.mark.slow
async def test_limits_are_documented_when_they_are_set(serve_site: ServeSite) -> None:
    async with serve_site(rate_limit=1000) as limited:
        document = (await limited.client.get("/schema/openapi.json")).json()
        assert "429" in document["paths"]["/events"]["post"]["responses"]
        assert "429" not in document["paths"]["/healthz"]["get"]["responses"]
        answer = await limited.client.get("/profiles/u")
        assert answer.headers["ratelimit-policy"] == '"requests";q=1000;w=1'


def _limited(site: Live, key: str) -> float:
    value = site.service.metrics.collectors.get_sample_value("profiles_rate_limited_total", {"key": key})
    return value or 0.0
