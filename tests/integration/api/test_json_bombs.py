"""Hostile JSON: nesting, numbers, names, surrogates, sizes. The answer is quick, and never a 5xx."""

import asyncio
import json
from collections.abc import Iterator
from time import process_time

import pytest

from tests.support.live import JSON, NDJSON, Live, new_user, problem

MB = 1_000_000
SLOW_S = 5.0  # what a bomb may take of the processor at most; each takes some tens of milliseconds
WITH_FEATURES = ("/profiles/batch", "/profiles/history", "/admin/rebuilds", "/admin/users/ada/rebuild")
ROUTES = ("/events", *WITH_FEATURES, "/score")
QUICK = ("/profiles/batch", "/score")  # and `/events`, line by line
FIELDS = (
    *("user_ids", "candidates", "profile_features", "features", "rows", "scope", "subject", "event_id"),
    *("dwell_ms", "known_at", "occurred_at"),
)


def nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + b"1" + closing * depth


VALUES = {
    "deep arrays": nested(b"[", b"]", 200_000),
    "deep objects": nested(b'{"a":', b"}", 200_000),
    "just too deep": nested(b"[", b"]", 5_000),
    "a number of a megabyte": b"9" * MB,
    "a fraction of a megabyte": b"0." + b"1" * MB,
    "an exponent of a megabyte": b"1e" + b"9" * MB,
    "an exponent": b"1e999999999",
    "a small exponent": b"-1e-999999999",
    "beyond 64 bits": b"18446744073709551616",
    "minus zero": b"-0",
    "a string of five megabytes": b'"' + b"x" * (5 * MB) + b'"',
    "escapes": b'"' + b"\\u0041" * 200_000 + b'"',
    "half a character": b'"\\ud800"',
    "the halves the wrong way round": b'"\\udc00\\ud800"',
    "an escaped NUL": b'"\\u0000"',
    "raw control characters": b'"\x00\x1b\n"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "UTF-16": '"é"'.encode("utf-16"),
    "many small objects": b"[" + b"{}," * 200_000 + b"{}]",
    "many empty strings": b"[" + b'"",' * 200_000 + b'""]',
    "NaN": b"NaN",
    "a comment": b"/**/1",
}


def bombs() -> Iterator[bytes]:
    """Each value alone and in the fields."""
    for value in VALUES.values():
        fields = FIELDS if len(value) < 100_000 else FIELDS[:1]
        yield from (value, *(b'{"%b":%b}' % (field.encode(), value) for field in fields), b'{"mood":%b}' % value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "route", [route if route in QUICK else pytest.param(route, marks=pytest.mark.slow) for route in ROUTES]
)
async def test_bomb_is_refused_quickly_alone_and_in_any_field(site: Live, route: str) -> None:
    for content in bombs():
        started = process_time()
        answer = await site.client.post(route, content=content, headers=JSON)
        assert answer.status_code in (400, 413, 422), (answer.status_code, content[:60])
        problem(answer, answer.status_code, content[:60])
        assert process_time() - started < SLOW_S, content[:60]
        # What was sent is not sent back.
        assert len(answer.content) < 2_000, content[:60]


async def test_bomb_is_refused_when_it_is_one_line(site: Live) -> None:
    for value in VALUES.values():
        if len(value) < 6 * MB:
            answer = await site.client.post("/events", content=b"{}\n" + value + b"\n{}", headers=NDJSON)
            assert problem(answer, answer.status_code)["status"] in (400, 422)


async def test_long_name_is_refused_with_a_short_answer(site: Live) -> None:
    for route in ROUTES:
        answer = await site.client.post(route, content=b'{"' + b"n" * MB + b'":1}', headers=JSON)
        assert len(problem(answer, 422)["errors"]) >= 1
        assert len(answer.content) < 2_000


async def test_many_names_are_refused_quickly(site: Live) -> None:
    content = json.dumps({f"name-{number}": number for number in range(50_000)}).encode()
    for route in ROUTES:
        started = process_time()
        problem(await site.client.post(route, content=content, headers=JSON), 422)
        assert process_time() - started < SLOW_S


async def test_features_are_refused_when_they_are_too_many(site: Live) -> None:
    names = b'{"features":[%b]}' % b",".join([b'""'] * 1_001)
    for route in WITH_FEATURES:
        (issue,) = problem(await site.client.post(route, content=names, headers=JSON), 422)["errors"]
        assert issue == {"path": "features", "detail": "Expected `array` of length <= 1000"}


async def test_last_value_counts_when_a_name_is_repeated(site: Live) -> None:
    # RFC 8259 leaves this open. The value that is checked must be the value that is used.
    user, other = new_user(), new_user()
    for path in ("/profiles/batch", "/profiles/batch?"):  # the second does not take the fast path
        content = f'{{"user_ids":["a/b"],"user_ids":["{user}"]}}'.encode()
        answer = await site.client.post(path, content=content, headers=JSON)
        assert [profile["user_id"] for profile in answer.json()["profiles"]] == [user]
        content = f'{{"user_ids":["{user}"],"user_ids":["a/b"]}}'.encode()
        problem(await site.client.post(path, content=content, headers=JSON), 422)
    now = "2099-01-01T00:00:00Z"
    event = (
        f'{{"subject":"signals.tip.served","event_id":"{other}","user_id":"{user}","user_id":"a/b","tip_id":"t",'
        f'"occurred_at":"{now}"}}'
    )
    problem(await site.client.post("/events", content=event.encode(), headers=JSON), 422)


async def test_other_requests_are_served_during_bombs(site: Live) -> None:
    bombs = [nested(b"[", b"]", 200_000), b"[" + b"{}," * 500_000 + b"{}]", b'{"a":' * 200_000]
    user = new_user()
    await site.features(user)
    waiting = [
        asyncio.get_running_loop().create_task(site.client.post(route, content=bomb, headers=JSON))
        for bomb in bombs
        for route in ROUTES[:3]
    ]
    assert (await site.features(user))["tip_volume_30d"] == 0
    assert not all(task.done() for task in waiting)
    for answer in await asyncio.gather(*waiting):
        assert answer.status_code in (400, 413, 422)
    assert (await site.client.get("/readyz")).status_code == 200
