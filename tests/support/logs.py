"""What configuring the log changes, and putting it back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from app.plain_structlog import structlog


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
