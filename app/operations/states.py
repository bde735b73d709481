"""States of the service and of what it depends on: as one process sees them, and as all of them do together.

What processes see may differ: one may not reach the cache that another does. Together they are as bad as the worst
that any process saw lately. Every process works that out from the same samples, so states do not flap when two
processes disagree, and a state gets better as soon as no process says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

State = Literal["ok", "degraded", "down", "unknown"]
COMPONENTS = ("service", "cache", "queue", "worker", "database", "features")
# Any knowledge beats none: a process that cannot ask the queue knows nothing of workers.
SEVERITY: Mapping[State, int] = {"unknown": 0, "ok": 1, "degraded": 2, "down": 3}
UNSEEN_MS = 60_000


class ReadinessCheck(NamedTuple):
    """One line of readiness: `ok` False degrades, `vital` False means reads can be right without it.

    `state` says how it stands where it is not ok.
    """

    ok: bool
    detail: str
    vital: bool = False
    state: State = "down"


class ComponentView(msgspec.Struct, frozen=True, array_like=True):
    """How a component looks to one process."""

    state: State
    detail: str


class ComponentStatus(NamedTuple):
    """How a component stands, since when, and when that was last seen."""

    component: str
    state: State
    detail: str
    since_ms: int
    seen_ms: int


OK = ComponentView("ok", "")


def looks_of(checks: Mapping[str, ReadinessCheck]) -> dict[str, ComponentView]:
    """Every component, by the lines of readiness."""

    def look(name: str) -> ComponentView:
        check = checks.get(name)
        if check is None:
            return ComponentView("unknown", "it was not asked")
        return OK if check.ok else ComponentView(check.state, check.detail)

    found = {name: look(name) for name in COMPONENTS if name != "service"}
    owed = checks.get("invalidations")
    if found["cache"] == OK and owed is not None and not owed.ok:
        found["cache"] = ComponentView(owed.state, owed.detail)
    wrong = [name for name, item in found.items() if item.state != "ok"]
    if any(check.vital and not check.ok for check in checks.values()):
        service = ComponentView("down", "it cannot serve reads")
    elif wrong:
        service = ComponentView("degraded", f"reads are right, but not everything is well: {', '.join(wrong)}")
    else:
        service = OK
    return {"service": service, **found}


def together(views: Iterable[Mapping[str, ComponentView]]) -> dict[str, ComponentView]:
    """What several processes see, as one: the worst that any of them knows of."""
    found: dict[str, ComponentView] = {}
    for view in views:
        for name, look in view.items():
            held = found.get(name)
            if held is None or SEVERITY[look.state] > SEVERITY[held.state]:
                found[name] = look
    return found


def standings(
    before: Mapping[str, ComponentStatus], seen: Mapping[str, ComponentView], now_ms: int
) -> list[ComponentStatus]:
    """How components stand now: a state that goes on keeps its beginning, unless no process looked for a while."""
    found = []
    for name, look in seen.items():
        held = before.get(name)
        goes_on = held is not None and held.state == look.state and now_ms - held.seen_ms <= UNSEEN_MS
        since_ms = held.since_ms if held is not None and goes_on else now_ms
        found.append(ComponentStatus(name, look.state, look.detail, since_ms, now_ms))
    return found
