"""Load shedding: rejects requests that would wait too long.

`Shedding` recognises events, scores and training sets by method and path alone, so that it can shed them cheaply:
before the body is read, and outside the framework. Other requests are shed when the layer that serves them raises
`Overloaded`. The load is estimated in `app.concurrency.overload`.
Invariant: a shed request is answered 503 with `Retry-After` and counted by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from litestar.types import HTTPScope

from app.concurrency.overload import OverloadQueue
from app.telemetry import Metrics, logger

WAIT_S = 2.0  # the longest wait before a request is shed: as long as events may wait for their commit
_MARK = "overloaded"
log = logger("api")

# By method and path: the kind of load, and a function that says whether there is too much of it. Other requests are
# never shed.
Checks = Mapping[tuple[str, str], tuple[str, Callable[[], bool]]]


def mark(scope: HTTPScope, kind: str) -> None:
    """Mark a request as shed. `kind` is the kind of load, such as `events`."""
    cast(dict[str, Any], scope)[_MARK] = kind


def mark_of(scope: HTTPScope) -> str | None:
    """The `kind` with which the request was marked as shed; None if it was not marked."""
    return cast(str | None, scope.get(_MARK))


class Shedding:
    def __init__(self, metrics: Metrics, checks: Checks) -> None:
        self._metrics = metrics
        self._checks = checks
        self._queue = OverloadQueue(WAIT_S)

    async def check(self, scope: HTTPScope) -> str | None:
        """Return None if the request is admitted, else the kind of load that is too high, such as `reads`; then the
        request is marked (`mark_of`). Under overload, wait for a while and check again before shedding."""
        if (kind := mark_of(scope)) is None and (kind := self.overload(scope)) is not None:
            if await self._queue.wait() and self.overload(scope) is None:
                return None
            mark(scope, kind)
            scope["path_template"] = scope["path"]
        return kind

    def overload(self, scope: HTTPScope) -> str | None:
        """The kind of load that is too high for the request now; None if it can be served."""
        check = self._checks.get((scope["method"], scope["path"]))
        return check[0] if check is not None and check[1]() else None

    def count(self, kind: str) -> None:
        """Count and log a shed request. Most of these lines are left out, since they would add to the load."""
        self._metrics.shed.labels(kind).inc()
        log.warning("request_shed", what=kind)
