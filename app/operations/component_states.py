"""Derives the state of the service and of its components from the readiness checks of all processes. If processes
disagree, for example because one cannot reach the cache, the worst recent report counts."""

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

State = Literal["ok", "degraded", "down", "unknown"]
COMPONENTS = ("service", "cache", "queue", "worker", "database", "features")
# `unknown` is the lowest: a process that cannot ask the queue must not hide what another one knows about the workers.
SEVERITY: Mapping[State, int] = {"unknown": 0, "ok": 1, "degraded": 2, "down": 3}
UNSEEN_MS = 60_000


class ComponentView(msgspec.Struct, frozen=True, array_like=True):
    """The state of a component as one process sees it. `detail` is the reason; empty if the state is `ok`."""

    state: State
    detail: str


class ReadinessCheck(NamedTuple):
    """The result of one check of `/readyz`. `state` is the component's state if the check is not `ok`. If a `vital`
    check fails, the service cannot serve reads. Any other failed check only degrades the service."""

    ok: bool
    detail: str
    vital: bool = False
    state: State = "down"

    @property
    def view(self) -> ComponentView:
        return OK if self.ok else ComponentView(self.state, self.detail)


class ComponentStatus(NamedTuple):
    """The state of a component as all processes see it: since when, and when a process last reported it (epoch ms)."""

    component: str
    state: State
    detail: str
    since_ms: int
    seen_ms: int


OK = ComponentView("ok", "")
UNASKED = ReadinessCheck(False, "it was not asked", state="unknown")


def component_views(checks: Mapping[str, ReadinessCheck]) -> dict[str, ComponentView]:
    """The state of every component and of the whole service, by name, from the checks of one process. A component
    without a check is `unknown`. If the check `cache` is ok, the component `cache` has the state of the check
    `invalidations`, which fails while cache keys must still be deleted."""
    found = {name: checks.get(name, UNASKED).view for name in COMPONENTS if name != "service"}
    if found["cache"] == OK and "invalidations" in checks:
        found["cache"] = checks["invalidations"].view
    service = OK
    if affected := [name for name, item in found.items() if item.state != "ok"]:
        service = ComponentView("degraded", f"reads are correct, but these need attention: {', '.join(affected)}")
    if any(check.vital and not check.ok for check in checks.values()):
        service = ComponentView("down", "it cannot serve reads")
    return {"service": service, **found}


def worst_views(views: Iterable[Mapping[str, ComponentView]]) -> dict[str, ComponentView]:
    """Combine the views of several processes: the worst state of each component, by name."""
    found: dict[str, ComponentView] = {}
    for components in views:
        for name, view in components.items():
            found[name] = max(found.get(name, view), view, key=lambda seen: SEVERITY[seen.state])
    return found


def updated_statuses(
    before: Mapping[str, ComponentStatus], views: Mapping[str, ComponentView], now_ms: int
) -> list[ComponentStatus]:
    """The new status of each component in `views`. `before` holds the previous statuses, by component. `since_ms` is
    kept if the state is unchanged and a process has reported the component within the last `UNSEEN_MS`."""
    found = []
    for name, view in views.items():
        now = ComponentStatus(name, view.state, view.detail, now_ms, now_ms)
        known = before.get(name, now)
        lasts = known.state == now.state and now_ms - known.seen_ms <= UNSEEN_MS
        found.append(now._replace(since_ms=known.since_ms) if lasts else now)
    return found
