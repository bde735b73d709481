"""`POST /events`: the producers' contract."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from app.errors import StoreFull, StoreUnavailable
from app.features.clock import DAY_MS
from tests.support.events import body, feedback, local_time, payload, served
from tests.support.live import JSON, NDJSON, Live, assert_refused, new_user, paths, problem

pytestmark = pytest.mark.both_engines


async def test_single_event_is_stored(site: Live) -> None:
    user = new_user()
    answer = await site.client.post("/events", json=payload(served(user, site.now_ms)))
    assert answer.status_code == 202
    assert answer.json() == {"accepted": 1, "duplicates": 0, "invalidated": True}
    assert answer.headers["cache-control"] == "no-store"
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_array_of_events_is_stored(site: Live) -> None:
    user = new_user()
    receipt = await site.send(*(served(user, site.now_ms) for _ in range(1_000)))
    assert receipt == {"accepted": 1_000, "duplicates": 0, "invalidated": True}
    assert (await site.features(user))["tip_volume_30d"] == 1_000


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\n\n  \n"])
async def test_lines_of_events_are_stored(site: Live, separator: bytes) -> None:
    user = new_user()
    sent = separator.join(json.dumps(payload(served(user, site.now_ms))).encode() for _ in range(3)) + separator
    answer = await site.client.post("/events", content=sent, headers=NDJSON)
    assert answer.json() == {"accepted": 3, "duplicates": 0, "invalidated": True}
    assert (await site.features(user))["tip_volume_30d"] == 3


async def test_event_counts_once_when_it_is_sent_again(site: Live) -> None:
    user = new_user()
    event = served(user, site.now_ms)
    assert (await site.send(event))["accepted"] == 1
    assert await site.send(event, served(user, site.now_ms)) == {"accepted": 1, "duplicates": 1, "invalidated": True}
    assert (await site.features(user))["tip_volume_30d"] == 2


async def test_event_counts_once_when_one_request_holds_it_twice(site: Live) -> None:
    event = served(new_user(), site.now_ms)
    assert await site.send(event, event) == {"accepted": 1, "duplicates": 1, "invalidated": True}


async def test_request_conflicts_when_an_id_is_known_with_other_content(site: Live) -> None:
    user = new_user()
    known = served(user, site.now_ms, event_id=new_user("event"))
    await site.send(known)
    other = served(user, site.now_ms, event_id=known.event_id, tip_id="another")
    answer = await site.client.post("/events", content=body(served(user, site.now_ms), other), headers=JSON)
    conflict = problem(answer, 409)
    assert known.event_id in conflict["detail"]
    assert paths(conflict) == ["[1].event_id"]
    assert (await site.features(user))["tip_volume_30d"] == 1


@pytest.mark.slow
async def test_next_read_reflects_the_event_when_many_users_write(site: Live) -> None:
    users = [new_user() for _ in range(20)]

    async def write_then_read(user: str) -> list[int]:
        counts = []
        for _ in range(3):
            await site.send(served(user, site.now_ms))
            counts.append((await site.features(user))["tip_volume_30d"])
        return counts

    assert await asyncio.gather(*map(write_then_read, users)) == [[1, 2, 3]] * len(users)


async def test_event_counts_at_once_when_its_clock_is_ahead(site: Live) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms + 4 * 60_000))
    assert (await site.features(user))["tip_volume_30d"] == 1


async def test_event_is_refused_when_it_is_invalid(site: Live) -> None:
    view, reaction = payload(served("u", site.now_ms)), payload(feedback("u", site.now_ms, dwell_ms=1))
    naive = local_time(site.now_ms).replace(tzinfo=None).isoformat()
    future = (local_time(site.now_ms) + timedelta(hours=1)).isoformat()
    ancient = payload(served("u", site.now_ms - 181 * DAY_MS))["occurred_at"]
    times = [naive, future, ancient, site.now_ms, "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"]
    ids = ["", "x" * 129, "a/b", "a\nb", "a\0b", "a\x7fb", "a\x85b", ".", "..", 1]
    bodies = [
        *((event, "$") for event in (None, 1, "event")),
        ({}, "subject"),
        *(({**view, "subject": subject}, "subject") for subject in ("signals.tip.forgotten", 1)),
        ({**view, "colour": "red"}, "colour"),
        ({**view, "action": "completed"}, "action"),  # a field of the other subject
        ({name: value for name, value in reaction.items() if name != "action"}, "action"),
        ({**reaction, "action": "eaten"}, "action"),
        *(({**reaction, "dwell_ms": ms}, "dwell_ms") for ms in (-1, 86_400_001, 2**64, 10**400, 1.5, "1")),
        *(({**view, "occurred_at": time}, "occurred_at") for time in times),
        *(({**view, name: value}, name) for name in ("event_id", "user_id", "tip_id", "decision_id") for value in ids),
        ([view, {**view, "tip_id": None}], "[1].tip_id"),
    ]
    await assert_refused(site, "/events", bodies)
    not_json = [({**reaction, "dwell_ms": ms}, "$") for ms in (float("nan"), float("inf"))]
    await assert_refused(site, "/events", not_json, 400)
    for events, places in (([], []), ([view] * 1_001, []), ([1, {**view, "tip_id": ""}], ["[0]", "[1].tip_id"])):
        assert paths(problem(await site.client.post("/events", json=events), 422)) == places


UNDECODABLE = [
    *(b"", b" \n\t", b"\0", b"nonsense", b"[] []", b"[" * 100_000, b'{"a":' * 100_000),
    *(b'{"subject": "signals.tip.served"', b'[{"subject": "signals.tip.served"}'),  # cut off
    *(b'{"subject": "\xff"}', b'[{"subject": "\xff"}]', b'{"subject": "signals.tip.served", "event_id": "\\ud800"}'),
    *(b'\xef\xbb\xbf{"subject": "signals.tip.served"}', '{"subject": "signals.tip.served"}'.encode("utf-16")),
]


async def test_request_is_refused_when_its_body_cannot_be_decoded(site: Live) -> None:
    for content in UNDECODABLE:
        for path in ("/events", "/profiles/batch") if content.strip() else ("/events",):
            answer = await site.client.post(path, content=content, headers=JSON)
            problem(answer, 400, content[:60])


async def test_refusal_names_the_line_when_it_is_not_json(site: Live) -> None:
    user = new_user()
    sound = [json.dumps(payload(served(user, site.now_ms))).encode() for _ in range(8)]
    sent = b"\n".join([*sound[:3], b"", *sound[3:5], b"{oops", *sound[5:]])
    refused = problem(await site.client.post("/events", content=sent, headers=NDJSON), 400)
    assert refused["detail"].startswith("line 7 is not valid JSON")
    assert paths(refused) == ["line 7"]
    assert (await site.features(user))["tip_volume_30d"] == 0


async def test_refusal_names_the_lines_when_events_are_invalid(site: Live) -> None:
    sound: dict[str, Any] = payload(served(new_user(), site.now_ms))
    sent = b"\n".join([json.dumps(event).encode() for event in (sound, {**sound, "user_id": ""}, 7)])
    refused = problem(await site.client.post("/events", content=sent, headers=NDJSON), 422)
    assert paths(refused) == ["line 2.user_id", "line 3"]


async def test_nothing_is_stored_when_one_event_of_many_is_refused(site: Live) -> None:
    user = new_user()
    sent = [payload(served(user, site.now_ms)) for _ in range(50)]
    sent[31]["occurred_at"] = "2099-01-01T00:00:00Z"
    refused = problem(await site.client.post("/events", json=sent), 422)
    assert paths(refused) == ["[31].occurred_at"]
    assert "nothing was stored" in refused["detail"]
    assert (await site.features(user))["tip_volume_30d"] == 0


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [(StoreUnavailable("disk I/O error"), 503, "1"), (StoreFull("the database has no room to write"), 507, "10")],
)
async def test_events_are_refused_when_the_database_does_not_store_them(
    site: Live, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, retry_after: str
) -> None:
    async def append(*_: object) -> None:
        raise error

    monkeypatch.setattr(site.service.consumer.log, "append", append)
    answer = await site.client.post("/events", content=body(served(new_user(), site.now_ms)), headers=JSON)
    problem(answer, status)
    assert answer.headers["retry-after"] == retry_after
