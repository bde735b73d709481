"""Pruning in tests, without pauses."""

from app.events.retention import Retention
from tests.support.clock import no_pause


async def night(retention: Retention, *, confirmed: bool = False) -> dict[str, int]:
    """Prune as `profiles prune` does. `confirmed`: as with `--confirm`."""
    await retention.move_cutoffs(confirmed=confirmed)
    return await retention.prune(no_pause)
