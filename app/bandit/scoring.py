"""Scoring: turns a scoring request into a stored decision.

Invariants: a decision is answered only after it is stored; two requests with the same id get the same decision; data of
a user that was read before the user's erasure is never stored after it. For the third, the database counts erasures:

1. A request takes the newest count that this process knew before the request began.
2. It reads the user's profile and statistics.
3. The user is erased; the same transaction increments the count.
4. The decision is not stored, since the count differs from the count in step 1, and the request decides again.

If another user was erased in step 3, the decision is stored: an event that the profile reflects still exists. If that
is not known, the request only decides once more than necessary. It also decides again if a worker has changed the
user's statistics since step 2.
"""

from __future__ import annotations

from collections.abc import Callable

from app.bandit.decisions import Decision, DecisionOutcome, Role, ScoringRequest, UserSnapshot
from app.bandit.model.inputs import PROFILE_FEATURES, Profile
from app.bandit.model.thompson_sampling import Policies, best, sample
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


class Scorer:
    def __init__(
        self,
        *,
        decisions: DecisionRepository,
        read_profile: ReadProfile,
        policies: Policies,
        new_id: Callable[[], str],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._decisions = decisions
        self._read_profile = read_profile
        self._policies = policies
        self._new_id = new_id
        self._clock = clock
        self._metrics = metrics
        self._erasures: int | None = None
        self._snapshots = Batcher(decisions.snapshots, clock.monotonic, BOUNDS)
        self._records = Batcher(decisions.record, clock.monotonic, BOUNDS)

    @property
    def overloaded(self) -> bool:
        """Whether so many requests wait that the next one would be shed; checked before its body is decoded."""
        return self._snapshots.overloaded or self._records.overloaded

    async def score(self, request: ScoringRequest) -> Decision:
        """Make and store a decision, or return the stored decision of the user with the same request id.

        Raises:
            Overloaded: too many requests wait; nothing was stored.
            StoreUnavailable: the database does not answer.
        """
        if self.overloaded:
            raise Overloaded(BOUNDS.kind)
        started = self._clock.monotonic()
        for _ in range(TRIES):
            if (decision := await self._try(request, started)) is not None:
                return decision
        raise StoreUnavailable(f"the user was erased or learned from in each of {TRIES} attempts; nothing was stored")

    async def explain(self, decision_id: str) -> tuple[Decision, DecisionOutcome]:
        """Find a decision and its outcome by the decision's id.

        Raises:
            NotFound: there is no such decision.
        """
        found = await self._decisions.find(decision_id)
        if found is None:
            raise NotFound(f"there is no decision {decision_id!r}; it may have been pruned or erased, or be damaged")
        return found

    async def close(self) -> None:
        """Wait until all database reads and writes of the requests in progress are done."""
        await self._snapshots.close()
        await self._records.close()

    async def _try(self, request: ScoringRequest, started: float) -> Decision | None:
        query = (request.user_id, request.request_id)
        if (erasures := self._erasures) is None:
            erasures = (await self._snapshots.submit(query)).erasures
        pending = self._snapshots.submit(query)
        profile, read = request.profile, None
        if request.origin == "service":
            profile, read = await self._read_profile(request.user_id)
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
        self._metrics.decisions.labels(decision.served_by, decision.origin).inc()
        return decision

    def _decide(
        self,
        request: ScoringRequest,
        profile: Profile,
        read: ProfileRead | None,
        snapshot: UserSnapshot,
        started: float,
    ) -> Decision:
        statistics = self._policies.grown(snapshot.statistics)
        spec = statistics.spec
        challenged = self._policies.challenger is not None and serves_challenger(
            request.user_id, snapshot.share, snapshot.salt
        )
        role: Role = "challenger" if challenged else "champion"
        policy = self._policies.policy(role)
        # Includes the inputs that only the other policy reads.
        phi = spec.phi(request.candidates, request.context, profile)
        decision_id = self._new_id()
        ranking, theta = policy.decide(decision_id, statistics, snapshot.prior.mu, phi, request.explore)
        chosen = sample(ranking.pi, decision_id) if request.explore else best(ranking.scores)
        return Decision(
            id=decision_id,
            request_id=request.request_id,
            user_id=request.user_id,
            created_at_ms=self._clock.now_ms(),
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
            profile_present=profile is not None and any(profile.get(name) is not None for name in PROFILE_FEATURES),
            candidates=request.candidates,
            context=request.context,
            chosen=chosen,
            elapsed_us=round((self._clock.monotonic() - started) * 1e6),
            theta=theta,
            phi=phi[chosen],
            champion=ranking if role == "champion" else None,
            challenger=ranking if role == "challenger" else None,
        )
