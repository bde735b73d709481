"""The log of a serving process in both formats: request ids in every line, no keys, no forged lines.

A read of a user named `boom…` fails with a message that looks like lines of the log.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from app.settings import hash_key
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.chat_server import answers, chat_server
from tests.support.live import KEYS, NO_TLS, as_caller, fresh_database
from tests.support.processes import await_listener, free_port
from tests.support.waiting import PATIENCE_S, eventually

CHILD = r"""
import app.api.auth.authentication
from app.asgi import run
from app.profiles.online.reader import ProfileReader
from app.settings import Settings

def failing(reading):
    async def read(self, wanted):
        for user in wanted:
            if user.startswith("boom"):
                raise RuntimeError(f"cannot read {user}\n2026-01-01T00:00:00Z [info     ] forged\r\x1b[2J")
        return await reading(self, wanted)
    return read

def hash_key(key):
    if key.startswith("break"):
        raise RuntimeError("cannot hash")
    return app.settings.hash_key(key)

app.api.auth.authentication.hash_key = hash_key
ProfileReader.read = failing(ProfileReader.read)
ProfileReader.read_shared_values = failing(ProfileReader.read_shared_values)
run(Settings.from_environment())
"""
MODEL_KEY = "not-for-the-log"
BREAKING = "break-while-this-key-is-in-scope"
TO_WORD = {"task": {"id": "t", "title": "Call Anna\n2026-01-01T00:00:00Z [info     ] forged"}}
FORGED = "boom\u2028 2026-01-01T00:00:00Z [info     ] forged \u202e"
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z \[\w+ *\] \w+")


class Process:
    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    @property
    def written(self) -> str:
        return self._log.read_text()


@asynccontextmanager
async def process(log_format: str, database: Path, log: Path, servers: tuple[str, str]) -> AsyncIterator[Process]:
    """Start a process with keys. At the end it must stop cleanly."""
    settings = {
        "DATABASE": str(database),
        "CACHE_URL": servers[0],
        "QUEUE_URL": servers[1],
        "PORT": str(free_port()),
        "LOG_FORMAT": log_format,
        "LOG_LEVEL": "debug",
        "API_KEYS": ",".join(
            f"{name}:{scope}:{hash_key(KEYS[name]).hex()}"
            for name, scope in (("reader", "read"), ("writer", "write"), ("admin", "admin"))
        ),
    }
    async with chat_server() as endpoint:
        endpoint.will(answers(401, f"your key {MODEL_KEY} is wrong".encode()))
        settings |= {"MODEL_URL": endpoint.url, "MODEL": "m", "MODEL_KEY": MODEL_KEY}
        async with _started(settings, log) as output:
            yield output


@asynccontextmanager
async def _started(settings: dict[str, str], log: Path) -> AsyncIterator[Process]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PROFILES_")}
    with log.open("wb") as file:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-W", "error", "-c", CHILD),
            env={**plain, **{f"PROFILES_{name}": value for name, value in settings.items()}},
            stdout=file,
            stderr=file,
        )
    output = Process(f"http://127.0.0.1:{settings['PORT']}", log)
    try:
        await asyncio.to_thread(await_listener, int(settings["PORT"]))
        yield output
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await child.wait() == 0, output.written[-2_000:]
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _traffic(url: str) -> dict[str, int]:
    """Send requests of every kind at once, with keys in every place; request id to status."""
    statuses: dict[str, int] = {}
    asked: list[Coroutine[None, None, None]] = []
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False, verify=NO_TLS) as client:

        async def ask(name: str, method: str, path: str, headers: dict[str, str], **more: object) -> None:
            headers = {**headers, "X-Request-Id": name}
            answer = await client.request(method, path, headers=headers, **more)  # type: ignore[arg-type]  # by name
            statuses[name] = answer.status_code

        for caller, key in KEYS.items():
            mine = as_caller(caller)
            asked.append(ask(f"{caller}-read", "GET", "/profiles/u", mine))
            asked.append(ask(f"{caller}-write", "POST", "/events", mine, content=b"nonsense"))
            asked.append(ask(f"{caller}-body", "POST", "/events", mine, json={"user_id": key, "subject": key}))
            asked.append(ask(f"{caller}-admin", "GET", "/admin/rebuilds", mine))
            asked.append(ask(f"{caller}-generate", "POST", "/generate", mine, json=TO_WORD))
            asked.append(ask(f"{caller}-boom", "GET", "/profiles/boom", mine))
            asked.append(ask(f"{caller}-query", "GET", f"/features?api_key={key}", mine))
            asked.append(ask(f"{caller}-path", "GET", f"/nothing/{key}", mine))
            asked.append(ask(f"{caller}-bearer", "GET", "/features", {"Authorization": f"Bearer {key}"}))
        breaking = {"X-API-Key": BREAKING}
        asked.append(ask("broken-hit", "GET", "/profiles/u", breaking))
        asked.append(ask("broken-features", "GET", "/features", breaking))
        asked.append(ask("broken-write", "POST", "/events", breaking, content=BREAKING.encode()))
        asked.append(ask("forger", "GET", f"/profiles/{FORGED}", as_caller("reader")))
        asked.append(ask("newline", "GET", "/profiles/a%0Ab%1B%5B2J", as_caller("reader")))
        await asyncio.gather(*asked)
    return statuses


async def _written(serving: Process, statuses: dict[str, int]) -> str:
    """The log, once it has a line of each request; the line follows the answer."""

    def complete() -> bool:
        lines = [line for line in serving.written.splitlines() if "status" in line]
        return all(any(name in line for line in lines) for name in statuses)

    await eventually(complete)
    return serving.written


ServeProcess = Callable[[str], AbstractAsyncContextManager[Process]]


@pytest.fixture
def served(
    migrated_template: Path, tmp_path: Path, cache_server: EmbeddedServer, queue_server: EmbeddedServer
) -> ServeProcess:
    """Starts a process with a format of the log."""
    database, servers = fresh_database(migrated_template, tmp_path), (cache_server.url, queue_server.url)
    return lambda log_format: process(log_format, database, tmp_path / "log", servers)


def assert_no_key(written: str) -> None:
    for key in (*KEYS.values(), BREAKING, MODEL_KEY):
        for secret in (key, hash_key(key).hex(), repr(hash_key(key))[2:-1]):
            assert secret not in written


@pytest.mark.slow
async def test_json_lines_have_request_ids_and_no_keys(served: ServeProcess) -> None:
    async with served("json") as serving:
        statuses = await _traffic(serving.url)
        written = await _written(serving, statuses)
    assert_no_key(written)
    lines = [json.loads(line) for line in written.splitlines()]
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)
    requests = {line["request_id"]: line for line in lines if line["event"] == "request"}
    assert {name: line["status"] for name, line in requests.items()} == statuses
    assert {line["route"] for name, line in requests.items() if name.endswith("-read")} == {"/profiles/{user_id}"}
    assert {line["route"] for name, line in requests.items() if name.endswith("-write")} == {"/events"}
    assert {statuses["reader-boom"], statuses["forger"]} == {500}
    assert statuses["reader-generate"] == 200
    assert {line["reason"] for line in lines if line["event"] == "model_failed"} <= {"refused", "circuit open"}
    assert [line["event"] for line in lines].count("model_failed") == 2  # the reader's and the admin's
    failed = [line for line in lines if line["event"] == "unexpected_error"]
    assert {line["request_id"] for line in failed} == {name for name, status in statuses.items() if status == 500}
    assert all("RuntimeError: cannot " in line["exception"] for line in failed)
    assert "\x1b" not in written
    assert [line["event"] for line in lines].count("serving") == 1


@pytest.mark.slow
async def test_all_lines_of_a_request_have_the_id_of_its_answer(served: ServeProcess) -> None:
    async with served("json") as serving:
        async with httpx.AsyncClient(
            base_url=serving.url, timeout=PATIENCE_S, trust_env=False, verify=NO_TLS
        ) as client:
            answer = await client.get("/profiles/boom", headers=as_caller("reader"))
        request_id = answer.headers["x-request-id"]
        written = await _written(serving, {request_id: answer.status_code})
    ids = {line["event"]: line["request_id"] for line in map(json.loads, written.splitlines()) if "request_id" in line}
    assert ids.keys() >= {"fast_path_failed", "unexpected_error", "request"}
    assert set(ids.values()) == {request_id}


@pytest.mark.slow
async def test_console_lines_have_no_keys_and_cannot_be_forged(served: ServeProcess) -> None:
    async with served("console") as serving:
        statuses = await _traffic(serving.url)
        written = await _written(serving, statuses)
    assert_no_key(written)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", written)
    lines = written.splitlines()
    ours = [line for line in lines if LINE.match(line)]
    assert not [line for line in ours if "forged" in line]
    assert any("forged" in line for line in lines)
    for line in set(lines) - set(ours):
        assert line.startswith(("Traceback (most recent call last):", "  ")) or re.match(r"\w+Error: ", line), line
    for name, status in statuses.items():
        assert [line for line in ours if f"request_id={name} " in line and f"status={status}" in line], name
