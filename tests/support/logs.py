"""What configuring the log changes, and putting it back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from app.telemetry.structlog_without_rich import structlog


@contextmanager
def logging_put_back() -> Iterator[None]:
    """Whatever `configure_logging` changes meanwhile is as it was afterwards."""
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
    """Stands in for a module's logger, and keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        def keep(event: str, **fields: Any) -> None:
            self.lines.append({"level": level, "event": event, **fields})

        return keep

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.lines if line["event"] == event]
