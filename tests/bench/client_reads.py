"""`python -m tests.bench.client_reads LIBRARY PORT KEY`: CPU time of this process per read, with 32 reads at a time."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import lru_cache
from threading import Barrier, Thread
from time import process_time
from typing import Any

import httpx

from profiles_client import AsyncProfiles, Profiles
from tests.bench.load import get

KEY = sys.argv[3]
USERS = 1_000
AT_ONCE = 32
READS = 300  # by each of the readers
TRACE = ContextVar[str | None]("TRACE", default=None)
SLOW_READS = {"httpx": 10}

Read = Callable[[str], object]
AsyncRead = Callable[[str], Awaitable[object]]


def _users(reader: int, reads: int) -> Iterator[str]:
    return (f"user-{(reader * 31 + number) % USERS + 1:04d}" for number in range(reads))


def in_threads(connect: Callable[[int], Read], port: int, reads: int) -> float:
    """Seconds of CPU per read. Each thread has a connection."""
    together = Barrier(AT_ONCE + 1)

    def work(reader: int, read: Read) -> None:
        read("user-0001")
        together.wait()
        for user in _users(reader, reads):
            read(user)
        together.wait()

    for reader in range(AT_ONCE):
        Thread(target=work, args=(reader, connect(port)), daemon=True).start()
    together.wait()
    began = process_time()
    together.wait()
    return (process_time() - began) / AT_ONCE / reads


async def in_tasks(connect: Callable[[int, AsyncExitStack], Awaitable[AsyncRead]], port: int, reads: int) -> float:
    """Seconds of CPU per read."""
    async with AsyncExitStack() as stack:
        read = await connect(port, stack)

        async def work(reader: int, reads: int) -> None:
            TRACE.set(f"00-{reader + 1:032x}-{1:016x}-01")
            for user in _users(reader, reads):
                await read(user)

        await asyncio.gather(*(work(reader, 1) for reader in range(AT_ONCE)))
        began = process_time()
        await asyncio.gather(*(work(reader, reads) for reader in range(AT_ONCE)))
        return (process_time() - began) / AT_ONCE / reads


def _bare_socket(port: int) -> Read:
    line = socket.create_connection(("127.0.0.1", port))

    def read(user: str) -> object:
        line.sendall(get(f"/profiles/{user}", KEY))
        return json.loads(line.recv(65_536).partition(b"\r\n\r\n")[2])

    return read


def _http_client(port: int) -> Read:
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def read(user: str) -> object:
        connection.request("GET", f"/profiles/{user}", headers={"X-API-Key": KEY})
        return json.loads(connection.getresponse().read())

    return read


@lru_cache  # all threads share one
def _profiles(port: int) -> Read:
    return Profiles(f"http://127.0.0.1:{port}", KEY, 10).__enter__().profile


async def _asyncio_streams(port: int, stack: AsyncExitStack) -> AsyncRead:
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def read(user: str) -> object:
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(f"/profiles/{user}", KEY))
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
        idle.append((reader, writer))
        return json.loads(body)

    return read


async def _httpx(port: int, stack: AsyncExitStack) -> AsyncRead:
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": KEY}, trust_env=False)
    await stack.enter_async_context(client)

    async def read(user: str) -> object:
        return (await client.get(f"/profiles/{user}")).json()

    return read


async def _aiohttp(port: int, stack: AsyncExitStack) -> AsyncRead:
    aiohttp: Any = __import__("aiohttp")
    session = await stack.enter_async_context(aiohttp.ClientSession(headers={"X-API-Key": KEY}))

    async def read(user: str) -> object:
        async with session.get(f"http://127.0.0.1:{port}/profiles/{user}") as answer:
            return json.loads(await answer.read())

    return read


async def _async_profiles(port: int, stack: AsyncExitStack) -> AsyncRead:
    return await _opened_client(port, stack, TRACE.get)  # reads of different traces do not share a request


async def _shared(port: int, stack: AsyncExitStack) -> AsyncRead:
    return await _opened_client(port, stack, lambda: None)


async def _opened_client(port: int, stack: AsyncExitStack, traceparent: Callable[[], str | None]) -> AsyncRead:
    client = AsyncProfiles(f"http://127.0.0.1:{port}", KEY, 10, traceparent=traceparent)
    return (await stack.enter_async_context(client)).profile


THREADS: dict[str, Callable[[int], Read]] = {
    "bare socket": _bare_socket,
    "http.client": _http_client,
    "Profiles": _profiles,
}
TASKS = {
    "asyncio streams": _asyncio_streams,
    "httpx": _httpx,
    "aiohttp": _aiohttp,
    "AsyncProfiles": _async_profiles,
    "AsyncProfiles, shared": _shared,
}

if __name__ == "__main__":
    name, at = sys.argv[1], int(sys.argv[2])
    count = SLOW_READS.get(name, READS)
    print(in_threads(THREADS[name], at, count) if name in THREADS else asyncio.run(in_tasks(TASKS[name], at, count)))
