"""Serving an ASGI application with granian, in this process and event loop, until a signal comes.

Invariant: `listen` returns within `STOP_GRACE_S` of the signal, whatever clients do.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server
from litestar.types import ASGIApp

from app.errors import SettingsError
from app.telemetry import logger

BACKLOG = 1024
STOP_GRACE_S = 5.0
log = logger("api")


async def listen(application: ASGIApp, host: str, port: int, on_stop: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT; `on_stop` is told of it first, and ends what would never end by itself.

    Raises:
        SettingsError: the system refuses the host or the port.
    """
    server = Server(
        application,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,
        websockets=False,
        backlog=BACKLOG,
        log_enabled=False,
    )
    try:
        await _until_stopped(server, on_stop)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and "os error" not in reason:  # so granian says what the system refused
            raise
        raise SettingsError("PROFILES_PORT", f"cannot serve on {host}:{port}: {reason}") from None


async def _until_stopped(server: Server, on_stop: Callable[[], None]) -> None:
    """granian waits for the last request however long it takes: for a sender that stalled in its body, for ever."""
    loop = asyncio.get_running_loop()
    serving = loop.create_task(server.serve())

    def stop() -> None:
        on_stop()
        server.stop()  # type: ignore[no-untyped-call]  # granian's, which has no types
        loop.call_later(STOP_GRACE_S, serving.cancel)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await asyncio.wait({serving})
    if serving.cancelled():
        log.warning("requests_cut_short", after_s=STOP_GRACE_S)
    else:
        serving.result()
