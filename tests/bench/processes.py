"""Processes under measurement that have no port to wait for."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from app.settings import Settings


@contextmanager
def running(command: list[str], settings: Settings) -> Iterator[None]:
    """A process that serves no port, told of the database and the servers, until the block ends."""
    environment = {
        **os.environ,
        "PROFILES_DATABASE": str(settings.database),
        "PROFILES_CACHE_URL": settings.cache_url or "",
        "PROFILES_QUEUE_URL": settings.queue_url or "",
        "PROFILES_LOG_LEVEL": "error",
        "PROFILES_WORKER_METRICS_PORT": "0",
    }
    process = subprocess.Popen(command, env=environment)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
