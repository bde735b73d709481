"""Background work that a process repeats until it stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from app.errors import Unavailable
from app.telemetry import logger, warn

log = logger("periodic")


async def repeat(
    name: str,
    work: Callable[[], Awaitable[object]],
    every_s: float,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Run `work`, pause for `every_s` seconds, and so on until cancelled.

    A run that fails is logged with its `name`: as put off if a server does not answer, else with its traceback.
    """
    while True:
        try:
            await work()
        except Unavailable as error:
            warn(log, error)("run_put_off", name=name, error=str(error))
        except Exception:
            log.exception("run_failed", name=name)
        await pause(every_s)
