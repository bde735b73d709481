"""A training set of a user with 150,000 events: it delays no other request, and ends with its client or its process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import pytest

from app.features.clock import rfc3339
from tests.support.bulk_users import add_users
from tests.support.fleet import Fleet, Member, counted
from tests.support.http import Connection
from tests.support.traffic import now_ms
from tests.support.waiting import eventually_async

EVENTS = 150_000
ROWS = 2_000  # some two minutes of work
SMALL_USERS = 20


class Site(NamedTuple):
    """An API process that computes a training set for minutes."""

    fleet: Fleet
    api: Member
    heavy: Connection
    asking: asyncio.Task[Any]
    small: Sequence[str]


def rows_of(users: Sequence[str], count: int) -> dict[str, object]:
    now = now_ms()
    rows = [{"user_id": users[n % len(users)], "as_of": rfc3339(now - n)} for n in range(count)]
    return {"rows": rows}


@pytest.fixture
async def site(fleet: Fleet) -> AsyncIterator[Site]:
    heavy = add_users(fleet.database, "heavy", 1, EVENTS, now_ms())
    small = add_users(fleet.database, "small", SMALL_USERS, 60, now_ms())
    (api,) = await fleet.apis(1)
    connection = Connection(api.port)
    before = await counted(api.port, "computation_seconds_count")
    asking = asyncio.create_task(connection.post("/profiles/history", rows_of(heavy, ROWS)))

    async def begun() -> bool:
        return await counted(api.port, "computation_seconds_count") >= before + 2

    await eventually_async(begun)
    yield Site(fleet, api, connection, asking, small)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await connection.close()


async def test_others_are_answered_during_a_heavy_history(site: Site) -> None:
    connection = Connection(site.api.port)
    for _ in range(5):
        history = await connection.post("/profiles/history", rows_of(site.small, SMALL_USERS))
        as_of = await connection.get(f"/profiles/{site.small[0]}?as_of={rfc3339(now_ms() - 1000)}")
        live = await connection.get(f"/profiles/{site.small[0]}")
        assert [answer.status for answer in (history, as_of, live)] == [200] * 3
        volumes = [row["features"]["tip_volume_30d"] for row in history.json["rows"]]
        assert volumes == [30] * SMALL_USERS
        assert "failed" not in history.json
    assert not site.asking.done()
    await connection.close()


async def test_work_ends_when_its_client_hangs_up(site: Site) -> None:
    site.asking.cancel()
    await asyncio.gather(site.asking, return_exceptions=True)
    await site.heavy.close()

    async def ended() -> bool:
        labels = {"route": "/profiles/history", "status": "499"}
        return await counted(site.api.port, "http_request_duration_seconds_count", **labels) == 1

    await eventually_async(ended)
    computed = await counted(site.api.port, "computed_users_total")
    connection = Connection(site.api.port)
    for _ in range(3):  # the reader is free, and in no transaction of old
        answer = await connection.post("/profiles/history", rows_of(site.small, SMALL_USERS))
        assert answer.status == 200
    assert await counted(site.api.port, "computed_users_total") == computed + 3 * SMALL_USERS
    await connection.close()


async def test_process_ends_when_it_computes_for_minutes(site: Site) -> None:
    site.api.program.send(signal.SIGTERM)
    assert await asyncio.to_thread(site.api.program.wait) == 0
    answer = await site.asking
    assert (answer.status, answer.json["detail"]) == (
        503,
        "past moments are not computed any more: this process stops; try again",
    )
    assert "requests_cut_short" not in site.api.program.output
    assert "Traceback" not in site.api.program.output
