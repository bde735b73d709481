"""Repeats background work with a pause after each run, and logs the runs that fail."""

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
    """Run `work`, then pause for `every_s` seconds, until cancelled.

    A run that fails is logged under `name`, and the next run takes place as usual. If a server stays unavailable, only
    the first failure is logged as a warning. Any other exception is logged with its traceback.
    """
    unavailable = False
    while True:
        try:
            await work()
            unavailable = False
        except Unavailable as error:
            (log.debug if unavailable else warn(log, error))("run_put_off", name=name, error=str(error))
            unavailable = True
        except Exception:
            log.exception("run_failed", name=name)
        await pause(every_s)
