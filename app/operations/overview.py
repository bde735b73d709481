"""Builds the overview page's data: component states, figures of the last hour, and the findings derived from both.

The component states come from checks that this process makes now, and from recent samples of other processes. If the
checks do not end in time, the stored states are shown. If the database does not answer, only the checks count.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from app.features.clock import rfc3339
from app.features.views import view
from app.operations.component_states import COMPONENTS, ComponentStatus, State, updated_statuses, worst_views
from app.operations.figures import SLOTS, Figure, Period, compute_figures, slot_starts
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
    """Build the overview as of `now_ms`. `own` is a sample without counts: the gauges and component states that this
    process sees now; None if its checks timed out. `more_findings` are added to those derived here. `history`: a period
    longer than an hour for the figures' series, and the summaries of the samples within it."""
    # A sample from the future was taken before the clock was set back. It would count as the newest for a long time.
    stored = [item for item in record.samples if item.at_ms <= now_ms + CURRENT_MS]
    newest = list({sample.process: sample for sample in stored}.values())
    statuses = _statuses(record.statuses, newest, own, now_ms)
    # With current gauges, so that a dead letter that was just replayed does not count as waiting.
    samples = stored if own is None else [*stored, own]
    period, of_period = history if history is not None else ("hour", samples)
    figures, counts = compute_figures(samples, of_period, period, now_ms)
    alive = [item for item in newest if now_ms - item.at_ms <= ALIVE_MS]
    found = [
        *findings(statuses, figures, counts),
        *mixed_registries(alive),
        *failing_model(stored, now_ms),
        *more_findings,
    ]
    state, verdict = _verdict({item.component: item.state for item in statuses}, len(found), sampled=bool(stored))
    return Overview(
        measured_at=rfc3339(now_ms),
        state=state,
        verdict=verdict,
        findings=found,
        components=[view(Component, item, name=item.component) for item in statuses],
        processes=[
            view(ProcessView, item, last_seen=rfc3339(item.at_ms))
            for item in sorted(alive, key=lambda item: (item.role, item.process))
        ],
        sampled=bool(stored),
        period=period,
        slot_s=SLOTS[period][0] // 1000,
        slots=[rfc3339(start) for start in slot_starts(now_ms, period)],
        figures=figures,
    )


def _statuses(
    stored: Mapping[str, ComponentStatus], newest: Iterable[Sample], own: Sample | None, now_ms: int
) -> list[ComponentStatus]:
    """The status of each component. If another process reports the state, the `detail` names that process."""
    found = dict(stored)
    if own is not None:
        views = [own.components]
        for sample in newest:
            if sample.process != own.process and not sample.stopped and abs(now_ms - sample.at_ms) <= CURRENT_MS:
                by = f" (reported by {sample.process_label})"
                views.append(
                    {
                        name: msgspec.structs.replace(seen, detail=seen.detail + by) if seen.detail else seen
                        for name, seen in sample.components.items()
                    }
                )
        found |= {item.component: item for item in updated_statuses(stored, worst_views(views), now_ms)}
    unknown = "no process has reported it yet"
    return [found.get(name) or ComponentStatus(name, "unknown", unknown, now_ms, now_ms) for name in COMPONENTS]


def _verdict(states: Mapping[str, State], found: int, *, sampled: bool) -> tuple[State, str]:
    """The state of the whole service, and the verdict in words. `found` is the number of findings."""
    attention = f"{'1 finding needs' if found == 1 else f'{found} findings need'} attention."
    if states["service"] == "down":
        return "down", f"Reads cannot be served; {attention}"
    if found:
        return "degraded", f"Reads are correct; {attention}"
    if "unknown" in states.values():
        return "unknown", "Some components could not be asked."
    return "ok", "Everything works." if sampled else "Everything works; there are no figures yet."
