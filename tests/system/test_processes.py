"""`profiles serve --processes N`: N processes on one port, killed, suspended, replaced and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from app.api.server import STOP_GRACE_S
from tests.support.events import payload, served
from tests.support.fleet import Fleet, Member, counted
from tests.support.http import Answer, Connection
from tests.support.processes import free_port, suspend
from tests.support.registry import own_entry, own_registry
from tests.support.senders import Senders
from tests.support.traffic import now_ms
from tests.support.waiting import eventually, eventually_async

PROCESSES = 3
REQUESTS = 60
ROLLS = 2
pytestmark = pytest.mark.slow


async def serve(fleet: Fleet, **settings: Any) -> Member:
    """Start `PROCESSES` processes, and wait until all are ready."""
    member = fleet.api(processes=PROCESSES, **settings)
    await asyncio.to_thread(member.program.says, f"{PROCESSES} API processes are ready")
    return member


def pids(member: Member) -> set[int]:
    return {pid for pid, line in member.program.family().items() if "--listener" in line}


async def ask(port: int, path: str = "/profiles/ann") -> Answer:
    """Send a request on a connection of its own."""
    connection = Connection(port)
    try:
        return await connection.get(path)
    finally:
        await connection.close()


async def is_said(member: Member, text: str, times: int = 1) -> None:
    await eventually(lambda: member.program.output.count(text) == times)


async def test_each_process_answers_and_has_its_own_metrics(fleet: Fleet) -> None:
    first = free_port()
    member = await serve(fleet, metrics_port=first)
    assert len(pids(member)) == PROCESSES
    sent = 0

    async def answered_by_each() -> list[float]:
        return [
            await counted(first + place, "http_request_duration_seconds_count", route="/profiles/{user_id}")
            for place in range(PROCESSES)
        ]

    async def all_have_answered() -> bool:
        nonlocal sent
        answers = await asyncio.gather(*(ask(member.port) for _ in range(REQUESTS)))
        assert {answer.status for answer in answers} == {200}
        sent += REQUESTS
        return all(await answered_by_each())

    await eventually_async(all_have_answered)
    assert sum(await answered_by_each()) == sent


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2])
async def test_others_serve_when_one_process_ends(fleet: Fleet, number: int) -> None:
    member = await serve(fleet)
    before = pids(member)
    gone = min(before)
    async with Senders(member.port).at_work() as senders:
        if number != signal.SIGKILL:  # which breaks connections, so it comes before the first one
            await senders.answered(REQUESTS)
        os.kill(gone, number)
        await senders.answered(REQUESTS)
        await eventually(lambda: len(pids(member) - {gone}) == PROCESSES)
        await senders.answered(REQUESTS)
    assert (senders.lost, senders.refused) == ([], 0)
    assert pids(member) > before - {gone}


async def test_others_serve_when_one_process_is_suspended(fleet: Fleet) -> None:
    member = await serve(fleet)
    suspended = min(pids(member))
    suspend(suspended)
    try:
        for _ in range(REQUESTS):
            assert (await ask(member.port)).status == 200
    finally:
        os.kill(suspended, signal.SIGCONT)


async def test_no_request_fails_when_the_processes_are_replaced(fleet: Fleet) -> None:
    member = await serve(fleet)
    statuses: set[int] = set()

    async def probe(connect: Callable[[], Connection]) -> None:
        connection = connect()
        while not senders.over:
            statuses.add((await connection.get("/readyz")).status)
            if connect is not keep:
                await connection.close()
                connection = connect()
        await connection.close()

    kept = Connection(member.port)

    def keep() -> Connection:
        return kept

    async with Senders(member.port).at_work() as senders:
        probes = [asyncio.create_task(probe(each)) for each in (keep, lambda: Connection(member.port))]
        for roll in range(1, ROLLS + 1):
            await senders.answered(REQUESTS)
            before = pids(member)
            member.program.send(signal.SIGUSR2)
            await is_said(member, f"replaced {PROCESSES} processes", roll)
            assert len(pids(member)) == PROCESSES
            assert not pids(member) & before
        await senders.answered(REQUESTS)
    await asyncio.gather(*probes)
    assert (senders.lost, senders.refused, statuses) == ([], 0, {200})
    assert fleet.stored() == senders.acknowledged
    assert "requests_cut_short" not in member.program.output


async def test_slow_request_is_answered_when_its_process_is_replaced(fleet: Fleet) -> None:
    member = await serve(fleet)
    body = json.dumps(payload(served("ann", now_ms()))).encode()
    head = f"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    lines = [await asyncio.open_connection("127.0.0.1", member.port) for _ in range(4 * PROCESSES)]
    for _, writer in lines:
        writer.write(f"{head}\r\n\r\n".encode() + body[:10])
    told = monotonic()
    member.program.send(signal.SIGUSR2)
    await eventually(lambda: monotonic() > told + STOP_GRACE_S + 2)  # a process that stops would have cut them
    for reader, writer in lines:
        writer.write(body[10:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 202")
        writer.close()
    await is_said(member, f"replaced {PROCESSES} processes")


async def test_old_processes_go_on_when_the_release_does_not_start(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    sound = own_entry()
    member = await serve(fleet, features=own_registry(path, sound))
    before = pids(member)
    own_registry(path, own_entry(compute="SELECT user_id, x AS value FROM views"))
    member.program.send(signal.SIGUSR2)
    await is_said(member, "the old processes go on")
    assert pids(member) == before

    killed = min(before)
    os.kill(killed, signal.SIGKILL)  # in its place, the new release cannot start, either
    await is_said(member, "died with exit code 2; restarting it in 1 s")
    assert (await ask(member.port)).status == 200

    own_registry(path, sound)
    await eventually(lambda: len(pids(member)) == PROCESSES)
    member.program.send(signal.SIGUSR2)
    await is_said(member, f"replaced {PROCESSES} processes")
    assert not pids(member) & before


async def test_error_is_printed_once_when_no_process_starts(fleet: Fleet, tmp_path: Path) -> None:
    broken = own_registry(tmp_path / "own.py", own_entry(compute="SELECT user_id, x AS value FROM views"))
    member = fleet.api(processes=PROCESSES, features=broken)
    assert await asyncio.to_thread(member.program.wait) == 2
    assert member.program.output.count("the SQL does not compile: no such column: x") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_no_request_is_lost_when_all_processes_stop(fleet: Fleet, number: int) -> None:
    member = await serve(fleet)
    async with Senders(member.port).at_work() as senders:
        await senders.answered(REQUESTS)
        member.program.send(number)
        assert await asyncio.to_thread(member.program.wait) == 0, member.program.output
        assert member.program.family() == {}
    assert senders.lost == []
    assert fleet.stored() == senders.acknowledged
    assert "requests_cut_short" not in member.program.output


async def test_all_processes_serve_while_they_drain(fleet: Fleet) -> None:
    member = await serve(fleet, drain_s=300)
    member.program.send(signal.SIGTERM)

    async def stopping() -> bool:
        return (await ask(member.port, "/readyz")).status == 503

    await eventually_async(stopping)
    assert (await ask(member.port)).status == 200
    assert len(pids(member)) == PROCESSES


async def test_processes_stop_when_their_supervisor_is_killed(fleet: Fleet) -> None:
    member = await serve(fleet)
    member.program.kill()
    await eventually(lambda: not member.program.family())


async def test_single_process_ignores_restarts_and_stops_on_hangup(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    api.program.send(signal.SIGUSR2)
    await is_said(api, "restart_ignored")
    assert (await ask(api.port)).status == 200
    assert api.program.stop(signal.SIGHUP) == 0
    assert fleet.worker().program.stop(signal.SIGHUP) == 0
