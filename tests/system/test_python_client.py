"""The Python client while API processes are killed and replaced: no call fails, and each event is stored once."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from profiles_client import AsyncProfiles, Profiles, TipServed
from tests.support.fleet import Fleet, Member
from tests.support.python_client import opened
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::profiles_client.ContractWarning"),
]
PROCESSES = 2
CALLERS = 4  # of each kind
CALLS = 40  # by all callers together, between two faults
DEADLINE_S = 60.0


def pids(member: Member) -> set[int]:
    return {pid for pid, line in member.program.family().items() if "--listener" in line}


class Callers:
    """Each sends an event and reads it back, again and again."""

    def __init__(self) -> None:
        self.sent = Counter[str]()
        self.over = False

    async def work(self, client: Any, user: str) -> None:
        while not self.over:
            event = TipServed(user_id=user, tip_id="tip", occurred_at=datetime.now(UTC))
            receipt = await client.send(event)
            assert receipt.accepted + receipt.duplicates == 1  # a duplicate, if the first answer was lost
            self.sent[event.event_id] += 1
            count = (await client.profile(user)).tip_volume_30d
            assert count <= self.sent.total()

    async def more(self, calls: int = CALLS) -> None:
        target = self.sent.total() + calls
        await eventually(lambda: self.over or self.sent.total() >= target, DEADLINE_S)


async def kill_one(member: Member) -> None:
    gone = min(pids(member))
    os.kill(gone, signal.SIGKILL)
    await eventually(lambda: len(pids(member) - {gone}) == PROCESSES, DEADLINE_S)


async def replace_all(member: Member) -> None:
    before = pids(member)
    member.program.send(signal.SIGUSR2)
    await eventually(lambda: len(pids(member)) == PROCESSES and not pids(member) & before, DEADLINE_S)


@pytest.mark.parametrize(("fault", "times"), [(kill_one, 3), (replace_all, 1)])
async def test_no_call_fails_when_processes_end(fleet: Fleet, fault: Callable[[Member], Any], times: int) -> None:
    member = fleet.api(processes=PROCESSES)
    await asyncio.to_thread(member.program.says, f"{PROCESSES} API processes are ready")
    callers = Callers()
    url = f"http://127.0.0.1:{member.port}"
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for kind in (Profiles, AsyncProfiles):
            client = await stack.enter_async_context(opened(kind(url, deadline_s=DEADLINE_S)))
            for number in range(CALLERS):
                group.create_task(callers.work(client, f"{kind.__name__}-{number}"))
        await callers.more()
        for _ in range(times):
            await fault(member)
            await callers.more()
        callers.over = True
    assert fleet.stored() == callers.sent


async def test_no_call_fails_when_the_service_restarts(fleet: Fleet) -> None:
    (member,) = await fleet.apis(1)
    url = f"http://127.0.0.1:{member.port}"
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(opened(kind(url, deadline_s=DEADLINE_S)))
            for kind in (Profiles, AsyncProfiles)
        ]
        for _ in range(2):
            for client in clients:
                await client.profile("ann")
            await asyncio.to_thread(member.program.stop)
            reads = [asyncio.create_task(client.profile("ann")) for client in clients]
            member = fleet.api(port=member.port)
            assert [features.tip_volume_30d for features in await asyncio.gather(*reads)] == [0, 0]
