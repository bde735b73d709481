"""What the routes need, handed to them by the composition root through the application's state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgspec
from litestar import Request

from app.api.auth.authentication import Authenticator
from app.api.auth.sessions import Sessions
from app.bandit.model.policies import Policies
from app.bandit.rollout.controller import Rollout
from app.bandit.scoring import Scorer
from app.events.ingest import Ingestor
from app.events.ports import ActivityCount, DeadLetters, Holdings, TracedEvent
from app.events.replay import Replayer
from app.features.clock import Clock
from app.features.plan import Announced
from app.features.registry import Registry
from app.generation.writing import Writing
from app.operations.audit import AuditTrail
from app.operations.ports import SampleStore
from app.operations.samples import Gauges
from app.operations.states import ReadinessCheck
from app.profiles.availability import FeatureAvailability
from app.profiles.consistency.inspection import Inspector
from app.profiles.online.reader import ProfileReader
from app.profiles.quality.runs import DataQuality
from app.profiles.rebuild.rebuilder import Rebuilder
from app.profiles.rebuild.runs import RebuildRepository, RebuildRunner
from app.telemetry import Metrics

HttpRequest = Request[Any, Any, Any]


class Registries(Protocol):
    """Which registries were served, and which features are disabled. Raises `StoreUnavailable`."""

    async def announced(self) -> list[Announced]:
        """Every registry that was ever served, the one that was seen last at the end."""
        ...

    async def switch(self, feature: str, actor: str, reason: str, now_ms: int, *, on: bool) -> str:
        """Enable or disable a feature; what was done, for the audit trail. Raises `Conflict` if it is so already."""
        ...


class UserEvents(Protocol):
    """What admins see of one user's events. Raises `StoreUnavailable`."""

    async def newest_events(self, user_id: str, limit: int) -> list[TracedEvent]:
        """Newest first."""
        ...

    async def activity(self, user_id: str, until_ms: int, days: int) -> list[ActivityCount]:
        """Counts over so many days of 24 hours that end at a moment, in no order; what is absent is 0."""
        ...


class UserRecords(Protocol):
    """All that the database holds of one user. Raises `StoreUnavailable`."""

    async def holdings(self, user_id: str) -> Holdings:
        """How much that is."""
        ...

    async def find(self, prefix: str, limit: int) -> list[str]:
        """Ids that begin with `prefix`, in the order of their UTF-8 bytes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """The parts behind the routes."""

    registry: Registry
    availability: FeatureAvailability
    registries: Registries
    costs: Mapping[int, float]
    mirror: type[msgspec.Struct]
    retention_days: int
    clock: Clock
    metrics: Metrics
    authenticator: Authenticator
    sessions: Sessions
    session_hours: int
    root_path: str
    reader: ProfileReader
    rebuilder: Rebuilder
    ingestor: Ingestor
    letters: DeadLetters
    users: UserRecords
    user_events: UserEvents
    inspector: Inspector
    samples: SampleStore
    process: str
    book: RebuildRepository
    runner: RebuildRunner
    quality: DataQuality
    erase: Callable[[str], Awaitable[Holdings]]
    recall: Callable[[], Awaitable[None]]
    start_rebuild: Callable[[str], Awaitable[None]]
    audit: Callable[[str, str, str, str], Awaitable[None]]
    trail: AuditTrail
    scorer: Scorer
    lineup: Policies
    rollout: Rollout
    pruning_waits: Callable[[], Awaitable[list[str]]]
    unknown_decisions: Callable[[], Awaitable[list[tuple[str, int]]]]
    replayer: Replayer
    writing: Writing
    readiness: Callable[[], Awaitable[dict[str, ReadinessCheck]]]
    gauges: Callable[[], Awaitable[Gauges]]
    refresh_gauges: Callable[[], Awaitable[None]]
    new_id: Callable[[], str]
    scratch: dict[str, Any] = field(default_factory=dict)


def api_of(request: HttpRequest) -> Api:
    """The `Api` of the application that a request came to."""
    return cast(Api, request.app.state.api)


def selected(registry: Registry, names: Sequence[str] | None) -> int:
    """The mask of the features named, or of all; raises `UnknownFeature`."""
    return registry.full_mask if names is None else registry.mask(names)
