"""Bodies of the wrong type or size, and senders that hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import uvloop

from app.api.auth.forms import MAX_BYTES, MAX_BYTES_WITHOUT_SCOPE, MEDIA_TYPE
from app.api.middleware import body_limits
from app.api.schemas import MAX_USERS
from app.errors import TooSlow
from app.features.ids import MAX_ID_LENGTH
from tests.support.live import JSON, Live, problem
from tests.support.pause_points import turn
from tests.support.registry import REGISTRY
from tests.support.waiting import PATIENCE_S, eventually

MB = 1_000_000
LIMIT = 8 * 1024 * 1024


OTHER_TYPES = (
    *("text/plain", "", "application/x-ndjson", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"),
    *("application/json; charset=latin-1", 'application/json; charset="utf-16"', "application/json; charset = latin-1"),
    *("application/json, application/json", "; charset=utf-8"),
)


async def test_body_is_refused_when_its_type_is_not_json(site: Live) -> None:
    for kind in OTHER_TYPES:
        for path in ("/profiles/batch", "/profiles/history"):
            answer = await site.client.post(path, content=b"{}", headers={"Content-Type": kind})
            assert "application/json" in problem(answer, 415, kind)["detail"]
        if not kind.endswith("urlencoded"):  # a form of the page
            answer = await site.client.post("/admin/rebuilds", content=b"{}", headers={"Content-Type": kind})
            problem(answer, 415, kind)


@pytest.mark.parametrize(
    ("path", "most"), [("/admin/sign-in", MAX_BYTES_WITHOUT_SCOPE), ("/admin/users/u/rebuild", MAX_BYTES)]
)
async def test_form_is_refused_when_it_is_too_large(site: Live, path: str, most: int) -> None:
    headers = {"Content-Type": MEDIA_TYPE}
    refused = await site.client.post(path, content=b"key=".ljust(most + 1, b"a"), headers=headers)
    assert f"{most:,} bytes" in problem(refused, 413)["detail"]
    allowed = await site.client.post(path, content=b"key=".ljust(most, b"a"), headers=headers)
    problem(allowed, 403)  # it carries no token


async def test_largest_form_fits_the_users_of_a_rebuild() -> None:
    ids = "\r\n".join([chr(0x1F600) * MAX_ID_LENGTH] * MAX_USERS)
    rest = {"csrf_token": "0" * 64, "scope": "users", "features": list(REGISTRY.names)}
    assert len(urlencode({"user_ids": ids, **rest}, doseq=True)) <= MAX_BYTES


async def test_body_is_read_when_its_type_is_json_in_another_spelling(site: Live) -> None:
    for kind in ("application/json;charset=UTF-8", 'APPLICATION/JSON; Charset="utf-8"', "application/json;"):
        content = b'{"user_ids":["u"]}'
        answer = await site.client.post("/profiles/batch", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 200, kind


async def test_body_is_refused_when_it_is_compressed(site: Live) -> None:
    for coding in ("gzip", "br", "identity, gzip", "GZIP"):
        for path in ("/events", "/profiles/batch"):
            headers = {**JSON, "Content-Encoding": coding}
            problem(await site.client.post(path, content=b"\x1f\x8b", headers=headers), 415, coding)


async def _chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // MB):
        yield b"x" * MB


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/events", "/profiles/batch", "/nothing", "/profiles/u"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_answer_arrives_when_the_body_is_far_too_large(site: Live, path: str, chunked: bool) -> None:
    size = (50 if path == "/events" else 20) * MB
    content = _chunks(size) if chunked else b"x" * size
    answer = await site.client.post(path, content=content, headers=JSON)
    problem(answer, {"/nothing": 404, "/profiles/u": 405}.get(path, 413))
    assert (await site.client.get("/healthz")).status_code == 200


@pytest.mark.slow
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


async def test_body_is_read_when_it_has_the_largest_size(site: Live) -> None:
    sound = b'{"user_ids":["u"]}'
    fits = await site.client.post("/profiles/batch", content=sound + b" " * (LIMIT - len(sound)), headers=JSON)
    assert fits.status_code == 200
    more = await site.client.post("/profiles/batch", content=sound + b" " * (LIMIT + 1 - len(sound)), headers=JSON)
    problem(more, 413)


async def test_request_is_refused_unread_when_its_body_is_invalid(site: Live) -> None:
    for headers, body, status in (
        (b"Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: 50000000\r\n", b"", b"413"),
        (b"Connection: close\r\nTransfer-Encoding: chunked\r\n", b"zz\r\n[]\r\n0\r\n\r\n", b"400"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST /events HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n" + body)
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 " + status)
        writer.close()
        await writer.wait_closed()


def _answers(site: Live) -> dict[str, int]:
    return {
        sample.labels["status"]: int(sample.value)
        for family in site.service.metrics.collectors.collect()
        for sample in family.samples
        if sample.name == "profiles_http_request_duration_seconds_count"
    }


async def test_request_counts_as_400_when_the_sender_hangs_up(own_site: Live) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", own_site.port)
    writer.write(b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n[{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: _answers(own_site))
    assert _answers(own_site) == {"400": 1}


async def _opened(site: Live, size: int, sent: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size)
    writer.write(b"x" * sent)
    await writer.drain()
    return reader, writer


async def _gets_an_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(body_limits.BODY_S / 2):
        assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
    writer.close()
    await writer.wait_closed()


async def test_answer_arrives_when_the_rest_of_a_body_does_not_come(
    site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_limits, "DRAIN_S", 0.2)
    await _gets_an_answer(*await _opened(site, size=MB, sent=10))


async def test_answer_arrives_when_more_is_sent_than_is_drained(site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "DRAIN_BYTES", 100_000)
    await _gets_an_answer(*await _opened(site, size=3 * MB, sent=MB))


@pytest.mark.slow
async def test_refused_body_is_drained_without_being_held(site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limits, "BODIES_BYTES", MB)
    reader, writer = await _opened(site, size=6 * MB, sent=5 * MB)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await reader.readline()
    writer.write(b"x" * MB)
    await _gets_an_answer(reader, writer)


async def test_cancelled_request_is_not_a_slow_one() -> None:
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


def _until(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def _never() -> Any:
    await asyncio.Event().wait()


async def test_each_body_is_awaited_until_its_own_deadline() -> None:
    """In whatever order the deadlines come, one timer ends every body at its own."""
    bodies, loop, message = body_limits.Bodies(), asyncio.get_running_loop(), {"type": "http.request", "body": b""}
    came = loop.create_future()

    async def later() -> Any:
        return await came

    deadlines = [_until(seconds) for seconds in (0.15, 0.05, 0.1)]

    async def until(at: float) -> None:
        with pytest.raises(TooSlow):
            await bodies.wait(_never, at)
        assert loop.time() >= at

    patient, arrives = (asyncio.create_task(bodies.wait(each, _until(60))) for each in (_never, later))
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*map(until, deadlines))
        came.set_result(message)
        assert await arrives is message
    assert not patient.done()
    patient.cancel()
    await asyncio.wait({patient})
    assert patient.cancelled()


async def test_request_that_is_cancelled_at_the_deadline_stays_cancelled() -> None:
    async def receive() -> Any:
        try:
            await _never()
        finally:
            waiting.cancel()  # a second time, besides the deadline

    waiting = asyncio.create_task(body_limits.Bodies().wait(receive, _until(0.01)))
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.wait({waiting})
    assert waiting.cancelled()


async def test_body_that_arrives_after_its_deadline_without_a_wait_is_taken() -> None:
    """Nor is the task cancelled afterwards, when it does other work."""

    async def receive() -> Any:
        return {"type": "http.request", "body": b"[]"}

    bodies = body_limits.Bodies()
    assert await bodies.wait(receive, _until(-1)) == {"type": "http.request", "body": b"[]"}
    await turn()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_deadline_that_is_due_at_once_ends_only_its_own_body(run: Any) -> None:
    async def both() -> list[object]:
        bodies = body_limits.Bodies()

        async def next_turn() -> Any:
            await turn()
            return {"type": "http.request", "body": b"[]"}

        waits = bodies.wait(_never, _until(0)), bodies.wait(next_turn, _until(30))
        return list(await asyncio.gather(*waits, return_exceptions=True))

    overdue, arrived = run(both())
    assert isinstance(overdue, TooSlow)
    assert arrived == {"type": "http.request", "body": b"[]"}


async def test_body_without_a_length_is_read_to_its_end() -> None:
    """As over HTTP/2, which needs no `Content-Length`."""
    parts = [b'{"user_ids":', b'["u"]}']

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    scope: Any = {"headers": []}
    body = body_limits.Body(scope, receive, body_limits.Bodies())
    first: Any = await body.receive()
    assert (first["more_body"], body.unread) == (True, True)
    last: Any = await body.receive()
    assert (last["body"], last["more_body"], body.unread) == (b'["u"]}', False, False)


@pytest.mark.parametrize("zeros", [4_300, 9_000])
async def test_length_with_many_zeros_gets_a_problem(site: Live, zeros: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    length = b"0" * zeros + b"18"
    writer.write(b"POST /profiles/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: " + length + b'\r\n\r\n{"user_ids":["u"]}')
    async with asyncio.timeout(PATIENCE_S):
        head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert head.split()[1] in (b"400", b"431")
    assert b"x-request-id: " in head


def _post(path: str, size: int) -> Any:
    """The ASGI scope of a POST of JSON."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % size)]
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "extensions": {}, "state": {},
    }  # fmt: skip


POSTS = ("/events", "/profiles/batch", "/score", "/profiles/history")


@pytest.mark.parametrize("path", POSTS)
async def test_answer_does_not_wait_for_the_end_of_a_body_that_is_complete(site: Live, path: str) -> None:
    """A server may report the end in a message of its own, as granian does."""
    parts, sent = [b'{"user', b'_id": 5}'], []

    async def receive() -> Any:
        if not parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": parts.pop(0), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(PATIENCE_S):
        await site.app(_post(path, sum(map(len, parts))), receive, send)
    assert (sent[0]["status"], parts) == (422, [])


@pytest.mark.parametrize("path", POSTS)
async def test_slow_body_is_awaited_only_once(site: Live, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(body_limits, "BODY_S", 0.01)
    waits = 0
    sent: list[Any] = []

    async def receive() -> Any:
        nonlocal waits
        waits += 1
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await site.app(_post(path, 50), receive, send)
    assert (sent[0]["status"], waits) == (408, 1)
