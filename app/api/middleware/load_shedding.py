"""Load shedding: rejects requests that would wait too long.

The core estimates the load (`app.concurrency.load_estimate`) of computed reads, past moments and events. Cache hits,
probes and admins' requests are never shed. The decision is made from method and path alone, before the body is read and
outside the framework, so that shedding is cheap.
Invariant: a shed request is answered 503 with `Retry-After` and counted by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, cast

from litestar.types import HTTPScope

from app.concurrency.overload_queue import OverloadQueue
from app.telemetry import Metrics, logger

DETAIL = "too much load ({}); nothing was done, try again shortly"
WAIT_S = 2.0  # at most, to be sent away after all: as long as events may wait for their commit
TELL_EVERY_S = 5.0
_MARK = "overloaded"
log = logger("api")

Checks = Mapping[tuple[str, str], tuple[str, Callable[[], bool]]]


def mark(scope: HTTPScope, kind: str) -> None:
    """Note that a request is sent away, and why."""
    cast(dict[str, Any], scope)[_MARK] = kind


def mark_of(scope: HTTPScope) -> str | None:
    """Why a request is sent away; None where it is not."""
    return cast(str | None, scope.get(_MARK))


class Shedding:
    """One process's."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._checks: Checks = {}
        self._turns = OverloadQueue(WAIT_S)
        self._told_at = float("-inf")
        self._untold = 0

    def open(self, checks: Checks) -> None:
        """By method and path: of what there may be too much, and whether there is."""
        self._checks = checks

    async def look(self, scope: HTTPScope) -> str | None:
        """Why this request must be sent away, if it must. Where it seems so, it takes some time until that is known."""
        if (kind := mark_of(scope)) is None:
            check = self._checks.get((scope["method"], scope["path"]))
            if check is not None and check[1]():
                if await self._turns.wait() and not check[1]():
                    return None
                kind = check[0]
                mark(scope, kind)
                scope["path_template"] = scope["path"]
        return kind

    def note(self, kind: str) -> None:
        """Count one that was sent away. The log tells of many at once: a line for each would add to the load."""
        self._metrics.shed.labels(kind).inc()
        self._untold += 1
        if monotonic() - self._told_at > TELL_EVERY_S:
            log.warning("requests_shed", requests=self._untold, kind=kind)
            self._told_at, self._untold = monotonic(), 0
