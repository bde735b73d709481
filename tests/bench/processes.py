"""Processes under measurement, gone when their block ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from app.settings import Settings

STOP_S = 20


@contextmanager
def running(command: list[str], environment: Mapping[str, str]) -> Iterator[int]:
    """A process with `environment` beside our own, and its id; it is told to stop, and killed where it does not."""
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()


def told_of(settings: Settings) -> dict[str, str]:
    """What a process of ours must know: the database and the servers."""
    return {
        "PROFILES_DATABASE": str(settings.database),
        "PROFILES_FEATURES": settings.features or "",
        "PROFILES_CACHE_URL": settings.cache_url or "",
        "PROFILES_QUEUE_URL": settings.queue_url or "",
        "PROFILES_NEAR_USERS": str(settings.near_users),
        "PROFILES_SHADOW": str(int(settings.shadow)),
        "PROFILES_LOG_LEVEL": "error",
    }
