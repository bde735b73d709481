"""Builds the overview page's data: component states, figures of the last hour, and the findings derived from both.

The component states come from checks that this process makes now, and from recent samples of other processes; a state
that another process reports carries that process's name. If the checks do not end in time, the stored states are shown.
If the database does not answer, there are no figures, and the states are the ones that this process sees.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from app.features.clock import rfc3339
from app.features.views import view
from app.operations.component_states import (
    COMPONENTS,
    ComponentStatus,
    ComponentView,
    State,
    updated_statuses,
    worst_views,
)
from app.operations.figures import SLOTS, Figure, Period, compute_figures, series, slot_starts
from app.operations.findings import Finding, failing_model, findings, mixed_registries
from app.operations.samples import Record, Role, Sample

# A little more than the ten seconds between two samples of a process.
CURRENT_MS = 12_000
ALIVE_MS = 30_000


class Component(msgspec.Struct):
    """The state of a component: since when it has lasted, and when a process last reported it (RFC 3339)."""

    name: str
    state: State
    detail: str
    since: str
    seen: str


class ProcessView(msgspec.Struct):
    """A process that took a sample in the last 30 seconds. Its name is random and new at every start."""

    role: Role
    process: str
    last_seen: str
    stopped: bool
    registry: Annotated[str, Meta(description="The fingerprint of the registry that it serves; empty if unknown.")]


class Overview(msgspec.Struct, kw_only=True):
    """The data of the overview page: the service's state, its problems, and the figures of the last hour."""

    measured_at: str
    state: State
    verdict: str
    findings: list[Finding]
    components: list[Component]
    processes: list[ProcessView]
    sampled: Annotated[bool, Meta(description="Whether a process has stored a sample within the last hour.")]
    period: Annotated[Period, Meta(description="What `series` covers: the last hour, day (48 half hours) or month.")]
    slot_s: int
    slots: Annotated[list[str], Meta(description="When each slot of `series` begins.")]
    figures: dict[str, Figure]


def build_overview(
    record: Record,
    own: Sample | None,
    now_ms: int,
    more_findings: Sequence[Finding] = (),
    history: tuple[Period, Sequence[Sample]] | None = None,
) -> Overview:
    """Build the overview as of `now_ms`, from the stored samples and statuses in `record`. `own` has the gauges and
    component states that this process sees now, and no counts; None if its checks did not end in time. `more_findings`
    are added to those derived here. `history`: a longer period for the figures' series, and the summaries within it."""
    # A sample from the future was taken before the clock was set back. It would count as the newest for a long time.
    record = record._replace(samples=[item for item in record.samples if item.at_ms <= now_ms + CURRENT_MS])
    statuses = _statuses(record, own, now_ms)
    # With current gauges, so that a dead letter that was just replayed does not count as waiting.
    samples = record.samples if own is None else [*record.samples, own]
    period, of_period = history if history is not None else ("hour", samples)
    figures, counts = compute_figures(samples, series(of_period, now_ms, period), now_ms)
    alive = [item for item in _newest(record.samples) if now_ms - item.at_ms <= ALIVE_MS]
    found = [
        *findings(statuses, figures, counts),
        *mixed_registries(alive),
        *failing_model(record.samples, now_ms),
        *more_findings,
    ]
    state, sampled = _overall(statuses, found), bool(record.samples)
    return Overview(
        measured_at=rfc3339(now_ms),
        state=state,
        verdict=_verdict(state, len(found), sampled=sampled),
        findings=found,
        components=[view(Component, item, name=item.component) for item in statuses],
        processes=[
            view(ProcessView, item, last_seen=rfc3339(item.at_ms))
            for item in sorted(alive, key=lambda item: (item.role, item.process))
        ],
        sampled=sampled,
        period=period,
        slot_s=SLOTS[period][0] // 1000,
        slots=[rfc3339(start) for start in slot_starts(now_ms, period)],
        figures=figures,
    )


def _statuses(record: Record, own: Sample | None, now_ms: int) -> list[ComponentStatus]:
    found = dict(record.statuses)
    if own is not None:
        others = [
            {name: _reported(seen, sample) for name, seen in sample.components.items()}
            for sample in _newest(record.samples)
            if sample.process != own.process and not sample.stopped and abs(now_ms - sample.at_ms) <= CURRENT_MS
        ]
        views = worst_views([own.components, *others])
        found |= {item.component: item for item in updated_statuses(record.statuses, views, now_ms)}
    unknown = "no process has reported it yet"
    return [found.get(name) or ComponentStatus(name, "unknown", unknown, now_ms, now_ms) for name in COMPONENTS]


def _newest(samples: Iterable[Sample]) -> list[Sample]:
    """The newest sample of each process; `samples` must come oldest first."""
    return list({sample.process: sample for sample in samples}.values())


def _reported(seen: ComponentView, sample: Sample) -> ComponentView:
    return ComponentView(seen.state, f"{seen.detail} (reported by {sample.process_label})" if seen.detail else "")


def _overall(statuses: Iterable[ComponentStatus], found: Collection[Finding]) -> State:
    """The state of the whole service: `down` only if reads cannot be served, `degraded` if there is any finding."""
    states = {item.component: item.state for item in statuses}
    if states["service"] == "down":
        return "down"
    if found:
        return "degraded"
    return "unknown" if "unknown" in states.values() else "ok"


def _verdict(state: State, found: int, *, sampled: bool) -> str:
    if state == "ok":
        return "Everything works." if sampled else "Everything works; there are no figures yet."
    if state == "unknown":
        return "Some components could not be asked."
    attention = "1 finding needs" if found == 1 else f"{found} findings need"
    reads = "Reads cannot be served" if state == "down" else "Reads are correct"
    return f"{reads}; {attention} attention."
