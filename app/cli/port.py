"""Checks whether ports are free before a server starts, so that a taken port causes a one-line error."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

from app.errors import SettingsError
from app.settings import Settings

RETRY_S = 0.05


def require_free_port(settings: Settings, wait_s: float = 0.0) -> None:
    """Raise `SettingsError` if PROFILES_PORT is still taken after `wait_s`.

    The server itself would share the port with another server of the same account (`SO_REUSEPORT`), and each would get
    half of the connections.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _probe(settings.host, settings.port)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(RETRY_S)
                continue
            raise SettingsError(
                "PROFILES_PORT", f"cannot serve on {settings.host}:{settings.port}: {error.strerror}"
            ) from error
        return


def next_free_port(host: str, port: int, excluded: int = 0) -> int:
    """The first free port from `port` on, except `excluded`; `port` itself if the next hundred are all taken."""
    for candidate in range(port, min(port + 100, 65_536)):
        with suppress(OSError):
            _probe(host, candidate)
            if candidate != excluded:
                return candidate
    return port


def _probe(host: str, port: int) -> None:
    socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
