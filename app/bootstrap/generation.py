"""Opens the generator of tips, which uses a language model if the settings name one, and templates otherwise."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.features.clock import Clock
from app.generation.generator import Model, TipGenerator
from app.settings import Settings
from app.telemetry import Metrics, logger

log = logger("generation")


@asynccontextmanager
async def open_tip_generator(settings: Settings, clock: Clock, metrics: Metrics) -> AsyncIterator[TipGenerator]:
    """Open the tip generator and its HTTP client. Raises `SettingsError` if the model's settings are incomplete."""
    settings.require_whole_model()
    if settings.model_url is None or settings.model is None:
        yield TipGenerator(None, clock, metrics)
        return
    # Imported here because most services have no model, and httpx takes a seventh of the start.
    from app.stores.llm import LlmWriter  # noqa: PLC0415

    writer = LlmWriter(settings.model_url, settings.model, clock, lambda: secrets.token_hex(8), key=settings.model_key)
    try:
        log.info("model_set", url=settings.model_url, model=settings.model)
        yield TipGenerator(Model(writer, settings.model, settings.model_calls), clock, metrics)
    finally:
        await writer.close()
