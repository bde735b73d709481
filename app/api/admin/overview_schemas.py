"""The overview's answer, and that of the search for users, as typed structs."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from app.operations.figures import HourIs, Unit
from app.operations.samples import Role
from app.operations.states import State


class FindingView(msgspec.Struct):
    """Something that is not well, what to do, and where."""

    state: State
    subject: str
    text: str
    advice: str
    path: str | None


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


class FigureView(msgspec.Struct):
    """A figure; null where nothing is known of it."""

    title: str
    explanation: str
    unit: Unit
    now: Annotated[float | None, Meta(description="Of the last minute; of a gauge, the newest.")]
    hour: float | None
    hour_is: Annotated[HourIs, Meta(description="What `hour` says: over the whole hour, the total, or the highest.")]
    series: Annotated[list[float | None], Meta(description="One for each of `slots`; the last one is not over.")]


class OverviewView(msgspec.Struct, kw_only=True):
    """Is everything well?"""

    measured_at: str
    state: State
    verdict: str
    findings: list[FindingView]
    components: list[Component]
    processes: list[ProcessView]
    sampled: Annotated[bool, Meta(description="Whether any process has stored a sample within the hour.")]
    slot_s: int
    slots: Annotated[list[str], Meta(description="When each slot of `series` begins.")]
    figures: dict[str, FigureView]


class UsersFound(msgspec.Struct):
    """Ids that begin with `prefix`, in the order of their UTF-8 bytes; `more`: there are others."""

    prefix: str
    user_ids: list[str]
    more: bool
