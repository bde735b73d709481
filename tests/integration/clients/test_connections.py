"""Connections of the Python client: servers that close them, answer slowly or not at all, and answer twice.

The server of these tests gives each connection a script: bytes to send after a request, or an event to wait for.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import uvloop

from profiles_client import AsyncProfiles, ContractWarning, DeadlineExceeded, Profiles, Unavailable
from profiles_client.transports import MAX_CONNECTIONS
from tests.support.processes import free_port
from tests.support.python_client import opened
from tests.support.waiting import eventually, eventually_async

BODY = b'{"user_id": "ann", "features": {"tip_volume_30d": 3}}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
BATCH = b'{"profiles": [%b]}' % BODY
ANSWERS = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BATCH), BATCH)
LAST = ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
NO_CONTRACT = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
OTHER_CONTRACT = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"features": []}'
BOTH = pytest.mark.parametrize("kind", [Profiles, AsyncProfiles])
DEADLINE_S = 20.0  # no test waits for it


class Server:
    """Answers the look at the contract with `contract`, and every other request with what `answer` returns for its
    number, counted from 0. None closes the connection."""

    def __init__(self, answer: Callable[[int], bytes | None]) -> None:
        self.answer = answer
        self.contract = NO_CONTRACT
        self.heads: list[bytes] = []
        self.connections: list[asyncio.StreamWriter] = []
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        with suppress(OSError, EOFError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /features "):
                    answer: bytes | None = self.contract
                else:
                    self.heads.append(head)
                    answer = self.answer(len(self.heads) - 1)
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
        writer.close()

    def close_connections(self) -> None:
        for connection in self.connections:
            connection.close()


@asynccontextmanager
async def serving(
    answer: Callable[[int], bytes | None], port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server, "127.0.0.1", port, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://localhost:{port}"
    try:
        yield server
    finally:
        listener.close()
        server.close_connections()
        await asyncio.gather(*(item.wait_closed() for item in server.connections), return_exceptions=True)


@BOTH
async def test_calls_share_a_connection(kind: Any) -> None:
    async with serving(lambda _: ANSWER) as server, opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
        for _ in range(5):
            assert (await client.profile("ann")).tip_volume_30d == 3
        assert len(server.connections) == 1


@BOTH
async def test_server_closes_idle_connections(kind: Any) -> None:
    async with serving(lambda _: ANSWER) as server, opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
        for _ in range(5):
            await client.profile("ann")
            server.close_connections()
        assert len(server.connections) == 5
        assert len(server.heads) == 5


@BOTH
async def test_connection_breaks_while_the_answer_is_awaited(kind: Any) -> None:
    partial = ANSWER[:-5]
    answers: list[bytes | None] = [ANSWER, None, partial, None, ANSWER]
    async with serving(lambda number: answers[number]) as server:

        def answer(number: int) -> bytes | None:
            if answers[number] is partial:
                server.connections[-1].write(partial)
                return None
            return answers[number]

        server.answer = answer
        async with opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
            await client.profile("ann")
            assert (await client.profile("ann")).tip_volume_30d == 3
            assert len(server.heads) == 5


@BOTH
@pytest.mark.parametrize("last", [LAST, ANSWER.replace(b"1.1", b"1.0"), ANSWER + ANSWER])
async def test_connection_is_not_used_again(kind: Any, last: bytes) -> None:
    async with serving(lambda _: last) as server, opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
        for number in range(3):
            assert (await client.profile("ann")).tip_volume_30d == 3
            assert len(server.connections) >= number + 1
        assert len(server.connections) >= 3


@BOTH
async def test_unrequested_bytes_answer_no_request(kind: Any) -> None:
    stolen = ANSWER.replace(b": 3", b": 9")
    async with serving(lambda _: ANSWER) as server, opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
        await client.profile("ann")
        server.connections[0].write(stolen)
        await server.connections[0].drain()
        if kind is AsyncProfiles:  # a blocking client looks at its connection when it reads
            await eventually(server.connections[0].is_closing)
        assert (await client.profile("ann")).tip_volume_30d == 3
        assert len(server.connections) == 2


@BOTH
async def test_deadline_ends_a_call_without_an_answer(kind: Any) -> None:
    answers = [ANSWER, b""]
    async with serving(lambda number: answers[number]) as server:
        async with opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
            await client.profile("ann")  # so that the next call need not connect within its short deadline
            began = monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.profile("ann", deadline_s=0.2)
            assert 0.15 < monotonic() - began < DEADLINE_S
            await eventually(lambda: len(server.heads) == 2)


@pytest.mark.slow
@BOTH
async def test_deadline_ends_a_call_whose_answer_trickles(kind: Any) -> None:
    async with serving(lambda _: ANSWER[:20]) as server, opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
        reading = asyncio.ensure_future(client.profile("ann", deadline_s=0.4))
        while not reading.done():
            if server.heads and not server.connections[0].is_closing():
                server.connections[0].write(b"X-Slow: 1\r\n" if server.heads else b"")
            await asyncio.wait({reading}, timeout=0.01)
        with pytest.raises(DeadlineExceeded):
            reading.result()


@BOTH
async def test_call_without_a_deadline_is_answered(kind: Any) -> None:
    async with serving(lambda _: ANSWER) as server, opened(kind(server.url, deadline_s=inf)) as client:
        assert (await client.profile("ann")).tip_volume_30d == 3


@BOTH
async def test_late_answer_answers_no_other_request(kind: Any) -> None:
    answers = [ANSWER, b"", ANSWER]
    async with serving(lambda number: answers[number]) as server:
        async with opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
            await client.profile("ann")
            assert await client.profile("ann", deadline_s=0.2, default=None) is None
            await eventually(lambda: len(server.heads) == 2)
            with suppress(OSError):
                server.connections[0].write(ANSWER.replace(b": 3", b": 9"))
            assert (await client.profile("ann")).tip_volume_30d == 3


@pytest.mark.slow
@BOTH
async def test_nothing_listens(kind: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with opened(kind(url, deadline_s=1.0)) as client:
        with pytest.raises(Unavailable, match=url.removeprefix("http://")):
            await client.profile("ann")
        assert await client.profile("ann", default="fallback") == "fallback"


@BOTH
async def test_service_starts_within_the_deadline(kind: Any) -> None:
    port = free_port()
    async with opened(kind(f"http://127.0.0.1:{port}", deadline_s=DEADLINE_S)) as client:
        reading = asyncio.ensure_future(client.profile("ann"))
        await asyncio.wait({reading}, timeout=0.1)
        assert not reading.done()
        async with serving(lambda _: ANSWER, port):
            assert (await reading).tip_volume_30d == 3


async def test_threads_share_a_client() -> None:
    async with serving(lambda _: ANSWER) as server, opened(Profiles(server.url, deadline_s=DEADLINE_S)) as client:
        for _ in range(4):
            found = await asyncio.gather(*(client.profile("ann") for _ in range(8)))
            assert [features.tip_volume_30d for features in found] == [3] * 8
        assert len(server.connections) <= 8


async def test_connections_of_a_past_peak_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(lambda number: b"" if number < 2 else ANSWER) as server:
        async with opened(Profiles(server.url, deadline_s=DEADLINE_S)) as client:
            reads = [asyncio.ensure_future(client.profile("ann")) for _ in range(2)]
            await eventually(lambda: len(server.heads) == 2)
            for connection in server.connections:
                connection.write(ANSWER)
            await asyncio.gather(*reads)
            monkeypatch.setattr("profiles_client.transports.IDLE_S", 0.2)

            async def closed_while_the_other_is_used() -> bool:
                await client.profile("ann")
                return any(item.is_closing() for item in server.connections)

            await eventually_async(closed_while_the_other_is_used)


async def test_tasks_share_a_limited_number_of_connections() -> None:
    async with serving(lambda _: ANSWER) as server:
        traces = iter(range(1_000))
        client = AsyncProfiles(server.url, deadline_s=DEADLINE_S, traceparent=lambda: str(next(traces)))
        async with client:
            found = await asyncio.gather(*(client.profile("ann") for _ in range(300)))
        assert len(found) == len(server.heads) == 300
        assert len(server.connections) <= MAX_CONNECTIONS


async def test_cancelled_task_leaves_no_connection_in_use() -> None:
    answers = [b"", ANSWER, ANSWER]
    async with serving(lambda number: answers[number]) as server:
        async with AsyncProfiles(server.url, deadline_s=DEADLINE_S) as client:
            reading = asyncio.create_task(client.profiles(["ann"]))
            await eventually(lambda: server.heads)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await eventually(server.connections[0].is_closing)
            assert (await client.profile("ann")).tip_volume_30d == 3


async def test_child_does_not_use_the_connections_of_its_parent() -> None:
    async with serving(lambda _: ANSWER) as server:
        client = Profiles(server.url, deadline_s=DEADLINE_S)
        async with opened(client) as parent:
            await parent.profile("ann")

            def in_child() -> int:
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        code = 0 if client.profile("ann").tip_volume_30d == 3 else 2
                    finally:
                        os._exit(code)  # an error must not run the rest of the tests in this process too
                return os.waitpid(child, 0)[1]

            assert await asyncio.to_thread(in_child) == 0
            assert len(server.connections) == 2
            await parent.profile("ann")
            assert len(server.connections) == 2


@BOTH
async def test_call_that_outlives_the_client_closes_its_connection(kind: Any) -> None:
    async with serving(lambda _: b"") as server:
        async with opened(kind(server.url, deadline_s=DEADLINE_S)) as client:
            reading = asyncio.ensure_future(client.profiles(["ann"]))
            await eventually(lambda: server.heads)
        server.connections[-1].write(ANSWERS)
        assert (await reading)["ann"].tip_volume_30d == 3
        await eventually(server.connections[-1].is_closing)


@BOTH
@pytest.mark.filterwarnings("error")
async def test_client_that_cannot_be_opened_leaves_no_connection(kind: Any) -> None:
    async with serving(lambda _: ANSWER) as server:
        server.contract = OTHER_CONTRACT
        with pytest.raises(ContractWarning):
            async with opened(kind(server.url, deadline_s=DEADLINE_S)):
                pass
        await eventually(server.connections[0].is_closing)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for `localhost`, and its key, in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    extension = ["-addext", "subjectAltName=DNS:localhost"]
    public = path.with_name("public.pem")
    files: list[str | Path] = ["-keyout", path, "-out", public]
    subprocess.run([*command.split(), *extension, *files], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + public.read_bytes())
    return path


@pytest.mark.slow
@BOTH
async def test_https_checks_the_certificate(kind: Any, certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with serving(lambda _: ANSWER, tls=tls) as server:
        trusting = ssl.create_default_context(cafile=certificate)
        async with opened(kind(server.url, deadline_s=DEADLINE_S, tls=trusting)) as client:
            for _ in range(2):
                assert (await client.profile("ann")).tip_volume_30d == 3
                server.close_connections()
        async with opened(kind(server.url, deadline_s=2.0)) as client:
            with pytest.raises(Unavailable, match="certificate"):
                await client.profile("ann")


def test_client_works_on_uvloop() -> None:
    async def calls() -> None:
        async with serving(lambda _: ANSWER) as server, AsyncProfiles(server.url, deadline_s=DEADLINE_S) as client:
            for _ in range(3):
                assert (await client.profile("ann")).tip_volume_30d == 3
                server.close_connections()
        async with serving(lambda _: b"") as server, AsyncProfiles(server.url, deadline_s=DEADLINE_S) as client:
            with pytest.raises(DeadlineExceeded):
                await client.profile("ann", deadline_s=0.0504)  # uvloop waits for 50 ms

    uvloop.run(calls())
