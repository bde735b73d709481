"""The shadow subprocess of an API process: decisions do not depend on it, and it ends with its parent."""

from __future__ import annotations

import asyncio
import os
import signal

from tests.support.fleet import Fleet, Member, counted
from tests.support.http import Connection
from tests.support.waiting import eventually, eventually_async

# It starts with what cores the tests beside leave over.
PATIENCE_S = 60.0
CANDIDATES = [
    {"id": f"tip-{number}", "features": {"is_overdue": number == 1, "task_age_days": 3 * number, "priority": number}}
    for number in range(4)
]


async def decide(port: int, count: int) -> None:

    async def one(number: int) -> int:
        connection = Connection(port)
        try:
            return (await connection.post("/score", {"user_id": f"user-{number}", "candidates": CANDIDATES})).status
        finally:
            await connection.close()

    assert set(await asyncio.gather(*map(one, range(count)))) == {200}


def shadowed(fleet: Fleet) -> int:
    return int(fleet.rows("SELECT COUNT(*) FROM tip_scores WHERE challenger_pi IS NOT NULL")[0][0])


async def beside(api: Member) -> int:
    """The process id of the shadow subprocess, once it runs."""
    await eventually(lambda: api.program.child("app.bandit.shadow.subprocess"), PATIENCE_S)
    return api.program.child("app.bandit.shadow.subprocess")


async def test_every_shadow_is_stored_when_the_api_stops(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    await decide(api.port, 5)
    await eventually(lambda: shadowed(fleet) == 5, PATIENCE_S)
    await decide(api.port, 40)
    assert api.program.stop() == 0, api.program.output
    assert shadowed(fleet) == 45
    assert api.program.family() == {}


async def test_shadows_continue_when_the_subprocess_is_killed(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    for round_ in range(1, 4):
        await decide(api.port, 10)
        await eventually(lambda wanted=10 * round_: shadowed(fleet) == wanted, PATIENCE_S)  # type: ignore[misc]  # a number
        os.kill(await beside(api), signal.SIGKILL)

    async def all_counted() -> bool:
        return await counted(api.port, "shadows_total", outcome="stored") == 30

    await eventually_async(all_counted)
    assert await counted(api.port, "shadows_total", outcome="lost") == 0


async def test_decisions_are_answered_when_the_subprocess_hangs(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    await decide(api.port, 1)
    pid = await beside(api)
    os.kill(pid, signal.SIGSTOP)
    await decide(api.port, 40)
    os.kill(pid, signal.SIGCONT)
    await eventually(lambda: shadowed(fleet) == 41, PATIENCE_S)


async def test_no_process_is_left_when_the_api_is_killed(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    await decide(api.port, 1)
    await beside(api)
    api.program.kill()
    await eventually(lambda: api.program.family() == {}, PATIENCE_S)


async def test_there_is_no_subprocess_without_a_challenger(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1, shadow=0)
    await decide(api.port, 1)
    assert list(api.program.family()) == [api.program.pid]
