"""Random bodies and request targets: every answer is well-formed, and never a 5xx."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.live import JSON, NDJSON, Live, new_user, problem, raw_status

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BODY_FIELDS = (
    "user_ids",
    "features",
    "rows",
    "scope",
    "candidates",
    "context",
    "task",
    "explore",
    "profile_features",
)
ITEM_FIELDS = ("user_id", "as_of", "known_at", "subject", "event_id", "occurred_at", "id", "title", "at", "request_id")
FIELDS = st.sampled_from(BODY_FIELDS + ITEM_FIELDS)
WORDS = st.sampled_from(
    ["all", "as_of", "signals.tip.served", "2026-04-25T08:30:00+02:00", "9999-12-31T23:59:59-14:00", "tip_volume_30d"]
)
NEAR_MISSES = st.recursive(
    st.none() | WORDS | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=12,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON_VALUES.map(lambda value: json.dumps(value).encode()),
    NEAR_MISSES.map(lambda value: json.dumps(value).encode()),
    st.tuples(NEAR_MISSES, st.binary(max_size=8)).map(lambda parts: json.dumps(parts[0]).encode() + parts[1]),
)


@pytest.mark.slow
@given(content=BODIES)
async def test_random_body_gets_a_valid_answer(site: Live, content: bytes) -> None:
    as_json = ("/events", "/profiles/batch", "/profiles/history", "/score", "/admin/rebuilds", "/generate")
    for path, headers in (*((path, JSON) for path in as_json), ("/events", NDJSON)):
        answer = await site.client.post(path, content=content, headers=headers)
        assert answer.status_code < 500, (path, content)
        if answer.status_code >= 400:
            problem(answer, answer.status_code)


IN_URLS = b"ABCxyz019-._~!$&'()*+,;=:@/?%"


@given(target=st.binary(max_size=40))
@pytest.mark.slow
async def test_random_target_gets_a_valid_answer(site: Live, target: bytes) -> None:
    # What no URL may hold as it is, the server refuses before the application hears of it.
    escaped = b"".join(bytes([byte]) if byte in IN_URLS else b"%%%02X" % byte for byte in target)
    for start in (b"/profiles/", b"/admin/users/", b"/admin/rebuilds/", b"/admin/dead-letters?after=", b"/profiles/u?"):
        status, _ = await raw_status(site, start + escaped)
        assert status < 500, start + escaped


async def test_site_serves_after_random_requests(site: Live) -> None:
    assert (await site.features(new_user()))["tip_volume_30d"] == 0
