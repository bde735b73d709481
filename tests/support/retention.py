"""Pruning in tests, without pauses."""

from __future__ import annotations

from app.events.retention import Retention
from tests.support.clock import no_pause


async def night(retention: Retention, *, confirmed: bool = False) -> dict[str, int] | None:
    """Prune as the nightly job does. `confirmed`: as `profiles prune --confirm` does."""
    return await retention.prune(await retention.next_cutoffs(confirmed=confirmed), no_pause)
