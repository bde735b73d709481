"""The consistency check: do the cached values of a user equal a recomputation?

A *violation* is a wrong cached value that `Inspector` confirmed. It is reported only if reads were allowed to serve
cached values before and after the inspection, and no event that is still being ingested explains it. Only `repair`
changes the cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, NamedTuple

import msgspec

from app.features.clock import rfc3339
from app.features.ids import user_hash
from app.profiles.consistency.inspection import InspectedCell, Inspection, Inspector
from app.profiles.online.invalidation import Stale
from app.telemetry import Metrics, logger

# `empty`: nothing is cached, so nothing can be wrong. `pending`: a value is older than an event that has not been
# acknowledged yet. `unchecked`: the cache is unavailable or not trusted, so reads compute.
Outcome = Literal["consistent", "empty", "pending", "violation", "unchecked"]
log = logger("profiles.consistency")


class CheckResult(NamedTuple):
    """The result of checking one user. `inspection` is None if the user was not checked. `untrue` has the features with
    a wrong cached value; it is empty unless the outcome is `violation`."""

    user_id: str
    outcome: Outcome
    inspection: Inspection | None = None
    untrue: tuple[InspectedCell, ...] = ()


class ConsistencyChecker(msgspec.Struct, kw_only=True, eq=False):
    """Checks the cached values of users. `drop` deletes cached values and makes every process clear its local cache."""

    inspector: Inspector
    drop: Callable[[Stale], Awaitable[None]]

    async def check(self, user_ids: Sequence[str]) -> list[CheckResult]:
        """Check some tens of users' cached values; return one result per user, in order. Raises `StoreUnavailable`."""
        if await self.inspector.cache_state() != "trusted":
            return [CheckResult(user_id, "unchecked") for user_id in user_ids]
        return [await self._result(inspection) for inspection in await self.inspector.inspect(user_ids)]

    async def repair(self, results: Sequence[CheckResult]) -> int:
        """Delete from the cache the wrong values that a check found; return their number. Raises `StoreUnavailable`."""
        stale = {result.user_id: [cell.entry.name for cell in result.untrue] for result in results if result.untrue}
        if stale:
            await self.drop(stale)
        return sum(map(len, stale.values()))

    async def _result(self, inspection: Inspection) -> CheckResult:
        user_id = inspection.user_id
        held = [cell.held for cell in inspection.cells if cell.held is not None]
        faults = tuple(cell for cell in inspection.cells if cell.fault is not None)
        outcome: Outcome = "consistent" if held else "empty"
        if inspection.cache != "trusted":
            outcome = "unchecked"
        elif faults:
            outcome = "violation"
            oldest = min(cell.held.version for cell in faults if cell.held is not None)
            only_stale = all(cell.fault == "stale" for cell in faults)
            if only_stale and await self.inspector.users.any_unconsumed(user_id, oldest):
                outcome = "pending"
        return CheckResult(user_id, outcome, inspection, faults if outcome == "violation" else ())


def report(result: CheckResult, metrics: Metrics, **context: object) -> list[dict[str, object]]:
    """Count and log the wrong cached values of one user. Return the facts that are needed to explain each.

    The log has a hash instead of the user id, because the user may be erased later. The sequence numbers of the newest
    events identify the user as long as the database holds these events.
    """
    found: list[dict[str, object]] = []
    for cell in result.untrue:
        assert cell.held is not None
        assert cell.held.expires_at_ms is not None
        assert result.inspection is not None
        metrics.consistency_violations.labels(cell.entry.name, cell.fault).inc()
        facts: dict[str, object] = {
            "feature": cell.entry.name,
            "fault": cell.fault,
            "held": cell.held.json.decode(errors="replace"),
            "computed": cell.outcome.json.decode(errors="replace"),
            "held_version": cell.held.version,
            "held_computed_at": rfc3339(cell.held.computed_at_ms),
            "held_expires_at": rfc3339(cell.held.expires_at_ms),
            "fingerprint": cell.held.fingerprint.decode(errors="replace"),
            "newest_events": dict(result.inspection.newest),
            "seen_at": rfc3339(result.inspection.at_ms),
        }
        log.error("consistency_violation", user=user_hash(result.user_id), **facts, **context)
        found.append(facts)
    return found
