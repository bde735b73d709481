"""A chat-completions endpoint on loopback with scripted answers, correct ones and failures.

Each request takes the next of `plans`; the last one is used for all later requests. Requests are kept in `asked`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A received request. Header names are in lower case."""

    target: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def has_schema(self) -> bool:
        return "response_format" in self.body

    @property
    def prompt(self) -> str:
        """The contents of all messages."""
        return "\n".join(message["content"] for message in self.body["messages"])


Plan = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


class ChatServer:
    def __init__(self) -> None:
        self.plans: list[Plan] = [says("A tip.")]
        self.asked: list[Asked] = []
        self.connections = 0
        self.url = ""
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def will(self, *plans: Plan) -> None:
        """Set the plans of the next requests; the last one is used for all later requests."""
        self.plans = list(plans)
        self.asked.clear()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/v1"

    async def close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listener.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            try:
                while not writer.is_closing():
                    asked = await _read(reader)
                    self.asked.append(asked)
                    plan = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
                    await plan(asked, writer)
                    await writer.drain()
            finally:
                writer.close()


@asynccontextmanager
async def chat_server() -> AsyncIterator[ChatServer]:
    server = ChatServer()
    await server.open()
    try:
        yield server
    finally:
        await server.close()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:]) if name.strip()
    }
    body = await reader.readexactly(int(headers["content-length"]))
    return Asked(head[0].split(" ")[1], headers, json.loads(body))


def completion(content: object, finish_reason: str | None = "stop", refusal: str | None = None) -> bytes:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    return json.dumps(
        {
            "id": "c-1",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1},
        }
    ).encode()


def tip(text: object) -> str:
    """The content of a correct answer."""
    return json.dumps({"text": text})


def answers(status: int, body: bytes = b"{}", **headers: str) -> Plan:
    """An answer with this status, body and headers (`_` in a name becomes `-`)."""

    async def plan(_: Asked, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} So", f"content-length: {len(body)}", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return plan


def says(text: object) -> Plan:
    """A correct answer with this text."""
    return answers(200, completion(tip(text)))


def refuses_schemas(otherwise: Plan, status: int = 400) -> Plan:
    """Refuses requests with `response_format`, as some endpoints do, and answers others as `otherwise`."""

    async def plan(asked: Asked, writer: asyncio.StreamWriter) -> None:
        told = b'{"error": {"message": "response_format is not supported"}}'
        await (answers(status, told) if asked.has_schema else otherwise)(asked, writer)

    return plan


async def is_silent(_: Asked, writer: asyncio.StreamWriter) -> None:
    """Reads the request and never answers."""
    await asyncio.Event().wait()


async def trickles(_: Asked, writer: asyncio.StreamWriter) -> None:
    """A head at once, then an endless body, byte by byte."""
    writer.write(b"HTTP/1.1 200 So\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\n \r\n")
        await writer.drain()
        await _short_pause()


async def trickles_its_head(_: Asked, writer: asyncio.StreamWriter) -> None:
    """Endless headers, one by one."""
    writer.write(b"HTTP/1.1 200 So\r\n")
    while True:
        writer.write(b"x-more: 1\r\n")
        await writer.drain()
        await _short_pause()


async def closes(_: Asked, writer: asyncio.StreamWriter) -> None:
    """Reads the request and closes the connection."""
    writer.close()


async def is_cut_short(_: Asked, writer: asyncio.StreamWriter) -> None:
    """Closes the connection after half of a correct answer."""
    body = completion(tip("A tip that is cut."))
    writer.write(b"HTTP/1.1 200 So\r\ncontent-length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
    await writer.drain()
    writer.close()


async def floods(_: Asked, writer: asyncio.StreamWriter) -> None:
    """An endless answer, as fast as the client reads."""
    writer.write(b"HTTP/1.1 200 So\r\ntransfer-encoding: chunked\r\n\r\n")
    piece = b" " * 16_384
    while True:
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()


async def speaks_no_http(_: Asked, writer: asyncio.StreamWriter) -> None:
    """Answers like a mail server."""
    writer.write(b"220 mail.example ESMTP\r\n")
    await writer.drain()
    writer.close()


async def _short_pause() -> None:
    step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.01, step.set_result, None)
    await step
