"""The services and repositories of one process, as routes, queue jobs and commands use them.

`app.bootstrap.service` builds them. This module names no adapter, so the HTTP layer can import it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from app.errors import SettingsError
from app.events.consume import Consumer
from app.events.erasure import Erasure
from app.events.ingest import Ingestor
from app.events.ports import DeadLetters, UserRecords
from app.events.queue_door import QueueDoor
from app.events.retention import Retention
from app.features.clock import Clock
from app.features.plan import Registries
from app.features.registry import Registry
from app.operations.audit import AuditTrail
from app.operations.component_states import ReadinessCheck
from app.operations.samples import Gauges, SampleStore
from app.profiles.consistency.checker import ConsistencyChecker
from app.profiles.consistency.decisions import DecisionChecker
from app.profiles.consistency.inspection import Inspector
from app.profiles.history import Moments
from app.profiles.online.compute import Computation
from app.profiles.online.invalidation import Invalidator
from app.profiles.online.reader import ProfileReader
from app.profiles.ports import LoggedProfiles
from app.profiles.quality.measurement import DataQuality
from app.profiles.rebuild import Rebuilder, RebuildRepository, RebuildRunner
from app.settings import Settings
from app.telemetry import Metrics

if TYPE_CHECKING:
    from app.bandit.learning.attribution import DecisionLearner
    from app.bandit.learning.maintenance import Maintenance
    from app.bandit.ports import DecisionRepository, StateRepository
    from app.bandit.rollout.controller import Rollout
    from app.bandit.scoring import Scorer


class Bandit(NamedTuple):
    """The parts of the contextual bandit that routes, jobs and commands use. `periodic` lists a worker's periodic
    tasks: for each, its name, its function and the seconds between two calls."""

    scorer: Scorer
    learner: DecisionLearner
    maintenance: Maintenance
    decisions: DecisionRepository
    states: StateRepository
    rollout: Rollout
    periodic: Sequence[tuple[str, Callable[[], Awaitable[object]], float]]


class Service:
    """All services and repositories of one process.

    `process` is a random name, new at every start. `costs` maps the index of a feature to the microseconds that
    computing it for one user took in a trial at start-up. `mirror` is the Struct type with a field for each feature. If
    PROFILES_SCORING is 0, `scoring` is None.
    """

    settings: Settings
    process: str
    clock: Clock
    metrics: Metrics

    registry: Registry
    mirror: type[msgspec.Struct]
    registries: Registries
    costs: Mapping[int, float]

    reader: ProfileReader
    computation: Computation
    invalidator: Invalidator
    rebuilder: Rebuilder
    rebuild_runs: RebuildRepository
    rebuild_runner: RebuildRunner
    clear_local_caches: Callable[[], Awaitable[None]]
    inspector: Inspector
    moments: Callable[[], Awaitable[Moments]]
    checker: ConsistencyChecker
    decision_checker: DecisionChecker
    logged_profiles: LoggedProfiles
    quality: DataQuality

    ingestor: Ingestor
    queue_door: QueueDoor
    consumer: Consumer
    dead_letters: DeadLetters
    retention: Retention
    users: UserRecords
    erasure: Erasure

    scoring: Bandit | None

    audit_trail: AuditTrail
    samples: SampleStore
    readiness: Callable[[], Awaitable[dict[str, ReadinessCheck]]]
    refresh_gauges: Callable[[], Awaitable[Gauges]]
    unknown_decisions: Callable[[], Awaitable[list[tuple[str, int]]]]

    @property
    def bandit(self) -> Bandit:
        """The contextual bandit. Raises `SettingsError` if scoring is switched off."""
        if self.scoring is None:
            raise SettingsError("PROFILES_SCORING", "is 0, so there are no decisions and no roll-out")
        return self.scoring
