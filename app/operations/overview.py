"""Is everything well? One look at states, figures and what follows from them.

What this process sees at this moment counts more than what it stored; what other processes saw lately counts too, and
says who saw it. Without a database there are no figures, and the states are those seen now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from app.features.clock import rfc3339
from app.operations.figures import SLOT_MS, Figure, board, slot_starts
from app.operations.findings import Finding, findings, mixed_registries
from app.operations.model_watch import failing_model
from app.operations.ports import Record
from app.operations.samples import Gauges, Role, Sample
from app.operations.states import COMPONENTS, ComponentStatus, ComponentView, State, standings, together

# One beat of the samples and a little more: after that what a process saw is no news.
NEWS_MS = 12_000
ALIVE_MS = 30_000


class Sight(NamedTuple):
    """What this process sees now."""

    looks: Mapping[str, ComponentView]
    gauges: Gauges


class Component(msgspec.Struct):
    """How a part stands, since when, and when that was last seen."""

    name: str
    state: State
    detail: str
    since: str
    seen: str


class ProcessView(msgspec.Struct):
    """A process that took a sample in the last 30 seconds. Its name is random, new with every start."""

    role: Role
    process: str
    last_seen: str
    stopped: bool
    registry: Annotated[str, Meta(description="The fingerprint of the registry that it serves; empty if unknown.")]


class Overview(msgspec.Struct, kw_only=True):
    """Is everything well?"""

    measured_at: str
    state: State
    verdict: str
    findings: list[Finding]
    components: list[Component]
    processes: list[ProcessView]
    sampled: Annotated[bool, Meta(description="Whether any process has stored a sample within the hour.")]
    slot_s: int
    slots: Annotated[list[str], Meta(description="When each slot of `series` begins.")]
    figures: dict[str, Figure]


def overview(record: Record, sight: Sight | None, process: str, now_ms: int, told: Sequence[Finding] = ()) -> Overview:
    """Put it together. `sight` is what this process sees now; None where that took too long. `told`: more findings."""
    # What comes from further ahead was written before the clock was set back; it would look like the newest for long.
    record = record._replace(samples=[item for item in record.samples if item.at_ms <= now_ms + NEWS_MS])
    shown = _standings(record, sight.looks if sight is not None else None, process, now_ms)
    starts_ms = slot_starts(now_ms)
    samples = [*record.samples]
    if sight is not None:  # gauges of this moment: what an admin has just replayed must not be shown as waiting
        samples.append(Sample(at_ms=now_ms, process=process, role="api", seconds=0.0, gauges=sight.gauges))
    figures, counted = board(samples, starts_ms, now_ms)
    alive = [item for item in _newest(record.samples) if now_ms - item.at_ms <= ALIVE_MS]
    wrong = [
        *findings(shown, figures, counted),
        *mixed_registries(alive),
        *failing_model(record.samples, now_ms),
        *told,
    ]
    state, sampled = _overall(shown, wrong), bool(record.samples)
    return Overview(
        measured_at=rfc3339(now_ms),
        state=state,
        verdict=_verdict(state, len(wrong), sampled=sampled),
        findings=wrong,
        components=[
            Component(item.component, item.state, item.detail, rfc3339(item.since_ms), rfc3339(item.seen_ms))
            for item in shown
        ],
        processes=[
            ProcessView(item.role, item.process, rfc3339(item.at_ms), item.stopped, item.registry)
            for item in sorted(alive, key=lambda item: (item.role, item.process))
        ],
        sampled=sampled,
        slot_s=SLOT_MS // 1000,
        slots=[rfc3339(start) for start in starts_ms],
        figures=figures,
    )


def _standings(
    record: Record, live: Mapping[str, ComponentView] | None, process: str, now_ms: int
) -> list[ComponentStatus]:
    found = dict(record.standings)
    if live is not None:
        others = [
            {name: ComponentView(look.state, _said_by(look.detail, sample)) for name, look in sample.looks.items()}
            for sample in _newest(record.samples)
            if sample.process != process and not sample.stopped and abs(now_ms - sample.at_ms) <= NEWS_MS
        ]
        seen = together([live, *others])
        found |= {item.component: item for item in standings(record.standings, seen, now_ms)}
    unknown = "no process has looked yet"
    return [found.get(name) or ComponentStatus(name, "unknown", unknown, now_ms, now_ms) for name in COMPONENTS]


def _newest(samples: Iterable[Sample]) -> list[Sample]:
    """The newest sample of each process."""
    return list({sample.process: sample for sample in samples}.values())


def _said_by(detail: str, sample: Sample) -> str:
    return f"{detail} (seen by {sample.told})" if detail else ""


def _overall(standings: Iterable[ComponentStatus], wrong: Collection[Finding]) -> State:
    """Down only where reads cannot be served: a queue that is down is a reason to act, not an outage."""
    states = {item.component: item.state for item in standings}
    if states["service"] == "down":
        return "down"
    if wrong:
        return "degraded"
    return "unknown" if "unknown" in states.values() else "ok"


def _verdict(state: State, wrong: int, *, sampled: bool) -> str:
    if state == "ok":
        return "Everything is well." if sampled else "Everything answers; there are no figures yet."
    if state == "unknown":
        return "Not everything could be asked."
    things = "one thing needs" if wrong == 1 else f"{wrong} things need"
    return f"It cannot serve reads; {things} you." if state == "down" else f"Reads are right; {things} a look."
