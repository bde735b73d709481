"""Is the port ours to take? Asked before anything is started, so that the answer is one line and not a traceback."""

from __future__ import annotations

import socket
import time
from contextlib import suppress

from app.errors import SettingsError
from app.settings import Settings

LOOK_S = 0.05


def require_free_port(settings: Settings, wait_s: float = 0.0) -> None:
    """Raise `SettingsError` where PROFILES_PORT is taken, and stays so for `wait_s`.

    The server itself would share the port with another one of the same user, and each would get half of the requests.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _bind(settings.host, settings.port)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(LOOK_S)
                continue
            raise SettingsError(
                "PROFILES_PORT", f"cannot serve on {settings.host}:{settings.port}: {error.strerror}"
            ) from error
        return


def next_free_port(host: str, port: int, but: int = 0) -> int:
    """The first free port from `port` on that is not `but`; `port` itself if there is none within a hundred."""
    for candidate in range(port, min(port + 100, 65_536)):
        with suppress(OSError):
            _bind(host, candidate)
            if candidate != but:
                return candidate
    return port


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
