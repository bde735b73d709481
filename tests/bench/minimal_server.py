"""Minimal applications on the same server: `python -m tests.bench.minimal_server litestar | asgi PORT`.

`litestar` has one route, and `asgi` is a bare function with a constant answer. They import no more than they need,
because their start is measured.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

BODY = b'{"user_id":"user-0001","features":{"completion_rate_30d":0.5,"dismiss_rate_30d":0.25,"tip_volume_30d":42}}'
HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))],
}


def litestar() -> Any:
    from litestar import Litestar, get  # noqa: PLC0415  # the bare function does not need it

    @get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    return Litestar([healthz], openapi_config=None, logging_config=None)


async def constant(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send(HEAD)
    await send({"type": "http.response.body", "body": BODY, "more_body": False})


async def serve(application: Any, port: int) -> None:
    """Serve on granian, as the service does, until SIGTERM."""
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
    uvloop.run(serve(litestar() if sys.argv[1] == "litestar" else constant, int(sys.argv[2])))
