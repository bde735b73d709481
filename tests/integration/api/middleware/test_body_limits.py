"""Bodies of the wrong kind or size, and senders that break off: the answer still reaches whoever listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from app.api.auth.forms import MAX_BYTES, MAX_BYTES_WITHOUT_SCOPE, MEDIA_TYPE
from app.api.middleware import body_limits
from app.api.schemas import MAX_USERS
from app.features.ids import MAX_ID_LENGTH
from tests.support.live import JSON, Live, problem
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually

MB = 1_000_000
LIMIT = 8 * 1024 * 1024


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "",
        "application/json; charset=latin-1",
        'application/json; charset="utf-16"',
        "application/json; charset = latin-1",
        "application/x-ndjson",
        "multipart/form-data; boundary=x",
        "application/json, application/json",
        "; charset=utf-8",
    ],
)
async def test_body_is_refused_when_it_is_of_another_kind(site: Live, kind: str) -> None:
    for path in ("/profiles/batch", "/profiles/history", "/admin/rebuilds"):
        answer = await site.client.post(path, content=b"{}", headers={"Content-Type": kind})
        assert "application/json" in problem(answer, 415)["detail"]


async def test_form_is_refused_when_a_route_takes_none(site: Live) -> None:
    for path in ("/profiles/batch", "/profiles/history"):
        answer = await site.client.post(path, data={"user_ids": "u"})
        assert "application/json" in problem(answer, 415)["detail"]


@pytest.mark.parametrize(
    ("path", "most"), [("/admin/sign-in", MAX_BYTES_WITHOUT_SCOPE), ("/admin/users/u/rebuild", MAX_BYTES)]
)
async def test_form_is_refused_when_decoding_it_would_take_long(site: Live, path: str, most: int) -> None:
    headers = {"Content-Type": MEDIA_TYPE}
    refused = await site.client.post(path, content=b"key=".ljust(most + 1, b"a"), headers=headers)
    assert f"{most:,} bytes" in problem(refused, 413)["detail"]
    allowed = await site.client.post(path, content=b"key=".ljust(most, b"a"), headers=headers)
    problem(allowed, 403)  # it carries no token


async def test_form_may_name_as_many_users_as_a_rebuild_takes() -> None:
    ids = "\r\n".join([chr(0x1F600) * MAX_ID_LENGTH] * MAX_USERS)
    rest = {"csrf_token": "0" * 64, "scope": "users", "features": list(REGISTRY.names)}
    assert len(urlencode({"user_ids": ids, **rest}, doseq=True)) <= MAX_BYTES


@pytest.mark.parametrize(
    "kind", ["application/json;charset=UTF-8", 'APPLICATION/JSON; Charset="utf-8"', "application/json;"]
)
async def test_body_is_read_when_its_kind_is_written_otherwise(site: Live, kind: str) -> None:
    answer = await site.client.post("/profiles/batch", content=b'{"user_ids":["u"]}', headers={"Content-Type": kind})
    assert answer.status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "GZIP"])
async def test_body_is_refused_when_it_is_compressed(site: Live, coding: str) -> None:
    headers = {**JSON, "Content-Encoding": coding}
    for path in ("/events", "/profiles/batch"):
        problem(await site.client.post(path, content=b"\x1f\x8b", headers=headers), 415)


async def _chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // MB):
        yield b"x" * MB


@pytest.mark.parametrize("path", ["/events", "/profiles/batch", "/nothing", "/profiles/u"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_answer_is_read_when_the_body_is_far_too_large(site: Live, path: str, chunked: bool) -> None:
    size = (50 if path == "/events" else 20) * MB
    content = _chunks(size) if chunked else b"x" * size
    answer = await site.client.post(path, content=content, headers=JSON)
    problem(answer, {"/nothing": 404, "/profiles/u": 405}.get(path, 413))
    assert (await site.client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "options",
    [
        ["--data-binary"],
        ["-H", "Expect:", "--data-binary"],
        ["-H", "Transfer-Encoding: chunked", "--data-binary"],
        ["-X", "POST", "-T"],
    ],
)
async def test_curl_reads_the_answer_when_the_body_is_far_too_large(
    site: Live, tmp_path: Path, options: list[str]
) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(50 * MB)
    named = f"@{big}" if options[-1] == "--data-binary" else str(big)
    command = ["curl", "-sS", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", *options, named]
    child = await asyncio.create_subprocess_exec(
        *command, f"{site.url}/events", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await child.communicate()
    assert (child.returncode, err) == (0, b"")
    body, _, status = out.rpartition(b"\n")
    assert status == b"413"
    assert json.loads(body)["status"] == 413


async def test_body_is_read_when_it_is_as_large_as_it_may_be(site: Live) -> None:
    sound = b'{"user_ids":["u"]}'
    fits = await site.client.post("/profiles/batch", content=sound + b" " * (LIMIT - len(sound)), headers=JSON)
    assert fits.status_code == 200
    more = await site.client.post("/profiles/batch", content=sound + b" " * (LIMIT + 1 - len(sound)), headers=JSON)
    problem(more, 413)


async def test_too_large_a_body_is_refused_unread_when_its_sender_waits_to_be_asked(site: Live) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(
        b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: 50000000\r\n\r\n"
    )
    async with asyncio.timeout(5):
        line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert line.startswith(b"HTTP/1.1 413 ")


def _answers(site: Live) -> dict[str, int]:
    return {
        sample.labels["status"]: int(sample.value)
        for family in site.service.metrics.collectors.collect()
        for sample in family.samples
        if sample.name == "profiles_http_request_duration_seconds_count"
    }


async def test_request_is_the_senders_fault_when_the_sender_hangs_up(own_site: Live) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", own_site.port)
    writer.write(b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n[{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: _answers(own_site))
    assert _answers(own_site) == {"400": 1}


async def test_request_is_refused_when_its_chunks_are_broken(site: Live) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(
        b"POST /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n[]\r\n0\r\n\r\n"
    )
    async with asyncio.timeout(5):
        line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert line.startswith(b"HTTP/1.1 400 ")


async def _opened(site: Live, size: int, sent: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
    writer.write(b"x" * sent)
    await writer.drain()
    return reader, writer


async def _is_told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(5):  # far less than a sender may take for its body
        assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
    writer.close()
    await writer.wait_closed()


async def test_answer_is_read_when_the_rest_of_a_refused_body_does_not_come(
    site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limits, "DRAIN_S", 0.2)
    await _is_told(*await _opened(site, size=MB, sent=10))


async def test_answer_is_read_when_more_would_come_than_is_taken_in(
    site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limits, "DRAIN_BYTES", 100_000)
    await _is_told(*await _opened(site, size=3 * MB, sent=MB))


async def test_a_refused_body_is_not_held_when_it_is_taken_in(site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "BODIES_BYTES", MB)
    reader, writer = await _opened(site, size=6 * MB, sent=5 * MB)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await reader.readline()
    writer.write(b"x" * MB)
    await _is_told(reader, writer)


async def test_a_request_that_is_cancelled_is_not_taken_for_a_slow_one() -> None:
    asked, never = asyncio.Event(), asyncio.Event()

    async def receive() -> Any:
        asked.set()
        await never.wait()

    scope: Any = {"headers": [(b"content-length", b"5")]}
    waiting = asyncio.create_task(body_limits.Body(scope, receive, body_limits.Bodies()).receive())
    await asked.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
