"""`profiles up`: how it starts, refuses to start, stops, and what a kill -9 of it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.settings import hash_key
from tests.support.events import payload, served
from tests.support.fleet import Fleet
from tests.support.http import Connection
from tests.support.processes import Program, Programs, free_port
from tests.support.traffic import now_ms
from tests.support.waiting import PATIENCE_S, eventually, eventually_async

FAMILY = 5  # itself, API, worker, cache, queue
pytestmark = pytest.mark.slow


def up(programs: Programs, port: int, **settings: Any) -> Program:
    """Start it, on its own metrics port, with an empty database."""
    chosen: dict[str, Any] = {"port": port, "worker_metrics_port": free_port(), "demo": 0, **settings}
    return programs.start("up", **chosen)


def bindable(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_when_up_stops(programs: Programs, tmp_path: Path, number: int) -> None:
    port = free_port()
    program = up(programs, port)
    program.says("Up.")
    assert len(program.family()) == FAMILY

    assert program.stop(number) == 0, program.output

    assert program.family() == {}
    assert bindable(port)
    assert sorted(path.name for path in (tmp_path / "var" / "run").glob("*.sock")) == []
    assert not (tmp_path / "var" / "run" / "servers.json").exists()
    assert "Traceback" not in program.output


def test_up_replaces_api_processes_and_worker(programs: Programs) -> None:
    program = up(programs, free_port(), processes=2)
    program.says("Up.")
    before = {pid for pid, line in program.family().items() if "-m app" in line}
    assert len(program.family()) == FAMILY + 1

    program.send(signal.SIGUSR2)
    program.says("replaced 3 processes")
    assert len(program.family()) == FAMILY + 1
    assert before & set(program.family()) == {program.pid}
    assert program.stop() == 0
    assert program.family() == {}


@pytest.mark.parametrize("stop", [Program.stop, Program.kill])
async def test_demo_set_is_completed_after_an_interruption(
    programs: Programs, tmp_path: Path, stop: Callable[[Program], object]
) -> None:
    program = up(programs, free_port(), demo=1)
    program.says("loading the demonstration set")
    await eventually(lambda: _users(tmp_path / "var" / "profiles.db.part") > 10)
    stop(program)
    assert not (tmp_path / "var" / "profiles.db").exists()
    again = up(programs, free_port(), demo=1)
    again.says("Up.")
    assert _users(tmp_path / "var" / "profiles.db") > 950
    assert not list((tmp_path / "var").glob("*.part*"))
    assert again.stop() == 0


def _users(database: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            (count,) = connection.execute("SELECT COUNT(DISTINCT user_id) FROM event_log").fetchone()
            return int(count)
    except sqlite3.OperationalError:
        return 0


async def test_up_continues_after_it_was_killed(programs: Programs, tmp_path: Path) -> None:
    port = free_port()
    first = up(programs, port)
    first.says("Up.")
    client = Connection(port)
    assert (await client.post("/events", payload(served("ann", now_ms()), event_id="before"))).status == 202
    await client.close()

    left = set(first.family()) - {first.pid}
    first.kill()
    second = up(programs, port)
    second.says("Up.")

    await eventually(lambda: not left & set(second.family()))  # children stopped, servers were taken over
    assert len(second.family()) == FAMILY
    answer = await client.get("/profiles/ann")
    assert answer.json["features"]["tip_volume_30d"] == 1

    async def ready() -> bool:
        return bool((await client.get("/readyz")).json["status"] == "ready")

    await eventually_async(ready)
    await client.close()
    assert second.stop() == 0
    assert second.family() == {}


async def test_children_stop_when_up_is_killed(programs: Programs) -> None:
    program = up(programs, free_port())
    program.says("Up.")
    program.kill()
    await eventually(lambda: not any("-m app" in line for line in program.family().values()))


def test_suggested_commands_work(programs: Programs) -> None:
    port = free_port()
    program = up(programs, port, api_keys=f"ops:admin:{hash_key('the-key').hex()}")
    program.says("Up.")
    assert "with KEY set to one of your keys: ops (admin)" in program.output
    tried = program.output.partition("Up. Try")[2]
    commands = re.findall(r"^  curl .*?(?=^  \S|^$)", tried, re.MULTILINE | re.DOTALL)
    shown = [
        subprocess.run(
            ["bash", "-c", command.replace("curl", "curl -sS --fail", 1)],
            env={**os.environ, "KEY": "the-key"},
            capture_output=True,
            check=True,
        ).stdout
        for command in commands
    ]
    assert [json.loads(answer)["features"]["completion_rate_30d"] for answer in (shown[0], shown[2])] == [None, 1]
    assert len(commands) == 3
    assert program.stop() == 0


def test_every_line_is_json_when_the_log_is_json(programs: Programs) -> None:
    program = up(programs, free_port(), log_format="json")
    program.says("Up.")
    assert program.stop() == 0
    assert all(json.loads(line)["event"] for line in program.output.splitlines())


def test_second_up_is_refused_in_the_same_directory(programs: Programs) -> None:
    port = free_port()
    first = up(programs, port)
    first.says("Up.")

    second = up(programs, free_port())
    assert second.wait() == 4
    assert "`profiles up` is already running on var" in second.output
    assert len(first.family()) == FAMILY
    assert not bindable(port)


def test_setting_is_named_when_a_port_is_taken(programs: Programs) -> None:
    port = free_port()
    with closing(socket.create_server(("127.0.0.1", port))):
        program = up(programs, port)
        assert program.wait() == 2
        assert f"error: PROFILES_PORT: cannot serve on 127.0.0.1:{port}: Address already in use" in program.output
        assert program.family() == {}


def test_up_runs_when_the_worker_metrics_port_is_taken(programs: Programs) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        program = up(programs, free_port(), worker_metrics_port=other.getsockname()[1])
        program.says("Up.")
        program.says("metrics_not_served")
        assert len(program.family()) == FAMILY
        assert program.stop() == 0
        assert "Traceback" not in program.output


def test_each_process_has_its_own_ports(programs: Programs, tmp_path: Path) -> None:
    started = []
    for name in ("first", "second"):
        directory = tmp_path / name
        directory.mkdir()
        program = programs.start("up", directory=directory, demo=0)
        program.says("Up.")
        found = re.search(r"http://127\.0\.0\.1:(\d+)/admin", program.output)
        assert found is not None
        started.append((program, int(found[1])))
    assert started[0][1] != started[1][1]
    assert "for PROFILES_PORT" in started[1][0].output
    for program, port in started:
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=PATIENCE_S).status_code == 200
        assert program.stop() == 0
        assert "metrics_not_served" not in program.output


async def test_new_database_gets_the_demo_set(programs: Programs) -> None:
    port = free_port()
    program = up(programs, port, demo=1)
    program.says("loading the demonstration set")
    client = Connection(port)
    answer = await client.get("/profiles/user-0001")  # it waits until the set is loaded
    program.says("Up.")
    assert answer.json["features"]["tip_volume_30d"] > 0
    quality = (await client.get("/admin/data-quality")).json
    figures = quality["features"]["completion_rate_30d"]
    assert figures["eligible"] > 900
    assert figures["fresh"] + figures["missing"] + figures["stale"] == figures["eligible"]
    await client.close()
    assert program.stop() == 0

    again = up(programs, port, demo=1)
    again.says("Up.")
    assert "loading the demonstration set" not in again.output
    assert again.stop() == 0


async def test_api_stops_when_a_request_stalls(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    client = Connection(api.port)
    assert (await client.get("/healthz")).status == 200  # and it stays connected
    with closing(socket.create_connection(("127.0.0.1", api.port))) as stalled:
        stalled.sendall(b"POST /events HTTP/1.1\r\nHost: here\r\nContent-Length: 500\r\n\r\n{")
        assert api.program.stop() == 0
    assert "requests_cut_short" in api.program.output
    await client.close()
