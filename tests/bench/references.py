"""What others would do on the same server: `python -m tests.bench.references constant | mget PORT [CACHE_URL]`.

`constant` is a bare ASGI application that answers always the same. `mget` is Litestar with one redis-py MGET a
request: what a careful person writes in an afternoon. Both on granian, as the service itself.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec
import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server
from litestar import Litestar, get, post
from redis.asyncio import BlockingConnectionPool, Redis

from app.features.definitions import REGISTRY

BODY = b'{"user_id":"user-0001","features":{"completion_rate_30d":0.5,"dismiss_rate_30d":0.25,"tip_volume_30d":42}}'
HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))],
}


async def constant(scope: Any, receive: Any, send: Any) -> None:
    """Always the same."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send(HEAD)
    await send({"type": "http.response.body", "body": BODY, "more_body": False})


class Users(msgspec.Struct):
    """The body of a batch."""

    user_ids: list[str]


def key(user_id: str, feature: str) -> str:
    """Where `fill_reference` puts a value."""
    return f"reference:{user_id}:{feature}"


def mget(url: str) -> Litestar:
    """One MGET a request, values as JSON."""
    pool: Any = BlockingConnectionPool.from_url(url, max_connections=64)
    redis: Any = Redis(connection_pool=pool)

    async def profiles(user_ids: list[str]) -> list[dict[str, Any]]:
        held = iter(await redis.mget([key(user_id, name) for user_id in user_ids for name in REGISTRY.names]))
        return [
            {"user_id": user_id, "features": {name: msgspec.json.decode(next(held)) for name in REGISTRY.names}}
            for user_id in user_ids
        ]

    @get("/profiles/{user_id:str}")
    async def one(user_id: str) -> dict[str, Any]:
        return (await profiles([user_id]))[0]

    @post("/profiles/batch", status_code=200)
    async def batch(data: Users) -> dict[str, Any]:
        return {"profiles": await profiles(data.user_ids)}

    return Litestar([one, batch], openapi_config=None, logging_config=None)


async def _serve(application: Any, port: int) -> None:
    server = Server(
        application,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        log_enabled=False,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    await server.serve()


if __name__ == "__main__":
    which, port, *rest = sys.argv[1:]
    uvloop.run(_serve(constant if which == "constant" else mget(*rest), int(port)))
