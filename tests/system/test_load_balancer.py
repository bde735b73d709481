"""API processes behind a real HAProxy with docker/haproxy.cfg: no request is lost when a host dies or is replaced."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, counted
from tests.support.haproxy import haproxy
from tests.support.http import Connection, serving
from tests.support.processes import free_port
from tests.support.senders import Senders
from tests.support.waiting import eventually, eventually_async

pytestmark = pytest.mark.slow

ANSWERS = 200
READINESS = "http_request_duration_seconds_count"
# More than the second or two in which HAProxy notices that a host is not ready.
DRAIN_S = 4


async def test_no_request_is_lost_when_a_host_is_killed(fleet: Fleet, tmp_path: Path) -> None:
    members = await fleet.apis(3)
    with haproxy(tmp_path, [member.port for member in members]) as port:
        await serving(port)
        senders = Senders(port)
        async with senders.at_work():
            await senders.answered(ANSWERS)
            members[0].program.kill()
            await senders.answered(ANSWERS)
    assert senders.lost == []
    assert senders.refused == 0
    assert fleet.stored() == senders.acknowledged


async def test_no_request_is_lost_when_hosts_are_replaced(fleet: Fleet, tmp_path: Path) -> None:
    members = await fleet.apis(3, drain_s=DRAIN_S)
    with haproxy(tmp_path, [member.port for member in members]) as port:
        await serving(port)
        senders = Senders(port)
        async with senders.at_work():
            for old in members:
                await senders.answered(ANSWERS)
                old.program.send(signal.SIGTERM)
                assert await asyncio.to_thread(old.program.wait) == 0, old.program.output
                await senders.answered(ANSWERS)
                fleet.api(port=old.port, drain_s=DRAIN_S)
                await serving(old.port)
    assert senders.lost == []
    assert senders.refused == 0
    assert fleet.stored() == senders.acknowledged


async def test_service_itself_answers_when_no_host_is_ready(fleet: Fleet, tmp_path: Path) -> None:
    (api,) = await fleet.apis(1, drain_s=300)
    with haproxy(tmp_path, [api.port, free_port(), free_port()]) as port:
        await serving(port)
        api.program.send(signal.SIGTERM)  # alive until the test ends, and not ready
        connection = Connection(port)
        log = tmp_path / "haproxy.log"
        await eventually(lambda: "backend 'ready' has no server available" in log.read_text())
        answer = await connection.get("/profiles/ann")
        await connection.close()
    assert answer.status == 200
    assert answer.json["user_id"] == "ann"


async def test_hosts_stay_ready_while_the_queue_is_silent(fleet: Fleet, tmp_path: Path) -> None:
    members = await fleet.apis(3)
    fleet.queue.signal(signal.SIGSTOP)
    log = tmp_path / "haproxy.log"
    with haproxy(tmp_path, [member.port for member in members]) as port:
        await serving(port)

        async def checked() -> bool:
            ready = [await counted(member.port, READINESS, route="/readyz", status="200") for member in members]
            return min(ready) >= 3 or "is DOWN" in log.read_text()

        await eventually_async(checked)
    assert "is DOWN" not in log.read_text()
