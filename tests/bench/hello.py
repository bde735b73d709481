"""The least that can be started on the same server: `python -m tests.bench.hello litestar | asgi PORT`.

`litestar` is an application with one route, `asgi` a bare function. Each imports what it needs and nothing else, for
what is measured of them is their start.
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
    """One route."""
    from litestar import Litestar, get  # noqa: PLC0415  # the bare function must not pay for it

    @get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    return Litestar([healthz], openapi_config=None, logging_config=None)


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


async def serve(application: Any, port: int) -> None:
    """On granian, as the service itself, until SIGTERM."""
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
