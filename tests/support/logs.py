"""Restores the configuration of logging, and records log lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from app.telemetry.logs import structlog


@contextmanager
def logging_put_back() -> Iterator[None]:
    """Restore everything that `configure_logging` changes in the block."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in ("arq", "aiosqlite", "asyncio", "alembic")}
    configuration = structlog.get_config()
    try:
        yield
    finally:
        structlog.configure(**configuration)
        root.handlers = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)


class Recorder:
    """Replaces the logger of a module and records its lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        def keep(event: str, **fields: Any) -> None:
            self.lines.append({"level": level, "event": event, **fields})

        return keep

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of one event."""
        return [line for line in self.lines if line["event"] == event]
