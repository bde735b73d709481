"""Joins what words tips: the service of `app.generation`, and the model behind it where one is set.

Only the HTTP service needs it, so it stands beside `app.bootstrap.service` and not in it.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.features.clock import Clock
from app.generation.writing import Model, Writing
from app.settings import Settings
from app.telemetry import Metrics, logger

log = logger("wording")


@asynccontextmanager
async def open_writing(settings: Settings, clock: Clock, metrics: Metrics) -> AsyncIterator[Writing]:
    """Open it, and close its connections on the way out.

    Raises:
        SettingsError: the model is set by half.
    """
    settings.require_whole_model()
    if settings.model_url is None or settings.model is None:
        yield Writing(None, clock, metrics)
        return
    # Only now: httpx takes a seventh of the start, and most services have no model.
    from app.stores.llm.client import Endpoint, LlmClient  # noqa: PLC0415
    from app.stores.llm.writer import LlmWriter  # noqa: PLC0415

    exchange = LlmClient(Endpoint(settings.model_url, settings.model_key))
    try:
        writer = LlmWriter(exchange, settings.model, clock, lambda: secrets.token_hex(8))
        log.info("model_set", url=settings.model_url, model=settings.model)
        yield Writing(Model(writer, settings.model, settings.model_calls), clock, metrics)
    finally:
        await exchange.close()
