"""Scoring: turns a scoring request into a stored decision.

Invariants: a decision is answered only after it is stored; two requests with the same id get the same decision; data of
a user that was read before the user's erasure is never stored after it. To ensure this, the database counts erasures:

1. A request takes the newest count that this process knew before the request began.
2. It reads the user's profile and statistics.
3. The user is erased; the same transaction increments the count.
4. The decision is not stored, since the count differs from the count in step 1, and the request decides again.

The count also differs if another user was erased. An erasure deletes all events of its user. So if an event that the
profile reflects still exists, the user was not erased, and the decision is stored. If the profile reflects no event, or
came with the request, the decision is stored only if step 2 found no statistics of the user. Otherwise the request
decides again, perhaps without need. It also decides again if a worker has changed the statistics since step 2.
"""

from collections.abc import Callable

import msgspec

from app.bandit.decisions import Decision, DecisionOutcome, ScoringRequest, UserSnapshot
from app.bandit.model.inputs import Profile
from app.bandit.model.thompson_sampling import Policies, Role, best, sample
from app.bandit.ports import DecisionRepository, ProposedDecision, ReadProfile
from app.bandit.rollout.stages import serves_challenger
from app.concurrency.batcher import Batcher, Bounds
from app.errors import NotFound, Overloaded, StoreUnavailable
from app.features.clock import Clock
from app.features.registry import ProfileRead
from app.telemetry import Metrics

# A request that would wait longer for one of its two database round trips is shed.
BOUNDS = Bounds(kind="scores", at_once=64, patience_s=1.0, most=2_000)
TRIES = 5


class Scorer(msgspec.Struct, kw_only=True, eq=False, dict=True):
    decisions: DecisionRepository
    read_profile: ReadProfile
    policies: Policies
    new_id: Callable[[], str]
    clock: Clock
    metrics: Metrics
    _erasures: int | None = None

    def __post_init__(self) -> None:
        self._snapshots = Batcher(self.decisions.snapshots, self.clock.monotonic, BOUNDS)
        self._records = Batcher(self.decisions.record, self.clock.monotonic, BOUNDS)

    @property
    def overloaded(self) -> bool:
        """Whether the next request would be shed; checked before its body is decoded."""
        return self._snapshots.overloaded or self._records.overloaded

    async def score(self, request: ScoringRequest) -> Decision:
        """Make and store a decision, or return the user's stored one with the same request id. Raises `Overloaded`,
        and stores nothing, if too many requests wait, and `StoreUnavailable`."""
        if self.overloaded:
            raise Overloaded(BOUNDS.kind)
        started = self.clock.monotonic()
        for _ in range(TRIES):
            if (decision := await self._try(request, started)) is not None:
                return decision
        raise StoreUnavailable(f"the user was erased or learned from in each of {TRIES} attempts; nothing was stored")

    async def explain(self, decision_id: str) -> tuple[Decision, DecisionOutcome]:
        """Find a decision and its outcome. Raises `NotFound`."""
        found = await self.decisions.find(decision_id)
        if found is None:
            raise NotFound(f"there is no decision {decision_id!r}; it may have been pruned or erased, or be damaged")
        return found

    async def close(self) -> None:
        """Wait for the database reads and writes of the requests in progress."""
        await self._snapshots.close()
        await self._records.close()

    async def _try(self, request: ScoringRequest, started: float) -> Decision | None:
        query = (request.user_id, request.request_id)
        if (erasures := self._erasures) is None:
            erasures = (await self._snapshots.submit(query)).erasures
        pending = self._snapshots.submit(query)
        profile, read = request.profile, None
        if request.origin == "service":
            profile, read = await self.read_profile(request.user_id)
        snapshot = await pending
        self._erasures = snapshot.erasures
        if snapshot.stored is not None:
            return snapshot.stored
        decision = self._decide(request, profile, read, snapshot, started)
        recorded = await self._records.submit(ProposedDecision(decision, erasures, snapshot.version))
        if recorded is None:
            self._erasures = None  # it may have changed
        if recorded is not decision:
            return recorded
        self.metrics.decisions.labels(decision.served_by, decision.origin).inc()
        return decision

    def _decide(
        self,
        request: ScoringRequest,
        profile: Profile,
        read: ProfileRead | None,
        snapshot: UserSnapshot,
        started: float,
    ) -> Decision:
        statistics = self.policies.grown(snapshot.statistics)
        spec = statistics.spec
        alone = self.policies.challenger is None
        served = not alone and serves_challenger(request.user_id, snapshot.share, snapshot.salt)
        role: Role = "challenger" if served else "champion"
        policy = self.policies.policy(role)
        # Includes the inputs that only the other policy reads.
        phi = spec.phi(request.candidates, request.context, profile)
        decision_id = self.new_id()
        ranking, theta = policy.decide(decision_id, statistics, snapshot.prior.mu, phi, request.explore)
        chosen = sample(ranking.pi, decision_id) if request.explore else best(ranking.scores)
        return Decision(
            id=decision_id,
            request_id=request.request_id,
            user_id=request.user_id,
            created_at_ms=self.clock.now_ms(),
            explore=request.explore,
            role=role,
            served_by=policy.id,
            policy_hash=policy.spec.hash,
            spec_hash=spec.hash,
            state_version=statistics.decisions,
            prior_version=snapshot.prior.version,
            origin=request.origin,
            profile=profile,
            profile_read=read,
            candidates=request.candidates,
            context=request.context,
            chosen=chosen,
            elapsed_us=round((self.clock.monotonic() - started) * 1e6),
            theta=theta,
            phi=phi[chosen],
            ranking=ranking,
            shadow=None,
        )
