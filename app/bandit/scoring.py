"""Scoring: from a request to a decision that is durable.

Invariants: a decision is answered only once it is stored; two requests with one id get one decision; and what was read
of a user before that user was erased is never stored after. The last needs a count of erasures: 1. a request takes the
count that this process knew before it began; 2. it reads the user's profile and evidence; 3. the user is erased, which
raises the count in the same transaction; 4. the decision is refused where the count is not that of 1, and made anew.
A count that is older than it need be only makes a decision anew in vain.

Only the policy that serves is computed before the answer; the other one's part is left to `app.bandit.shadow.queue`.
"""

from __future__ import annotations

from collections.abc import Callable

from app.bandit.decisions import Decision, DecisionOutcome, Known, Role, ScoringRequest
from app.bandit.model.inputs import PROFILE_FEATURES, Array, Inputs, Profile, terms_of
from app.bandit.model.policies import Policies
from app.bandit.model.ranking import chosen, ranking_of
from app.bandit.model.specs import Spec
from app.bandit.ports import DecisionRepository, Proposed, Question, ReadProfile, Recorded
from app.bandit.shadow.queue import Shadower
from app.bandit.shadow.scores import Unshadowed
from app.concurrency.batcher import Batcher, Bounds
from app.errors import Conflict, Issue, NotFound, Overloaded, StoreUnavailable
from app.features.clock import Clock
from app.telemetry import Metrics

# Who would wait longer for one of the two rounds is sent away.
BOUNDS = Bounds(kind="scores", at_once=64, patience_s=1.0, most=2_000)
TRIES = 5


class Scorer:
    """Ranks candidates. One per process."""

    def __init__(
        self,
        *,
        book: DecisionRepository,
        read_profile: ReadProfile,
        lineup: Policies,
        serves_challenger: Callable[[str, float], bool],
        shadower: Shadower,
        new_id: Callable[[], str],
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        """`serves_challenger` says of a user and a share whether that user is in it."""
        self._book = book
        self._read_profile = read_profile
        self._lineup = lineup
        self._serves_challenger = serves_challenger
        self._shadower = shadower
        self._new_id = new_id
        self._clock = clock
        self._metrics = metrics
        self._erasures: int | None = None
        self._looks: Batcher[Question, Known] = Batcher(book.look, clock.monotonic, BOUNDS)
        self._records: Batcher[Proposed, Recorded] = Batcher(book.record, clock.monotonic, BOUNDS)

    @property
    def overloaded(self) -> bool:
        """Whether the next decision would be rejected; checked before its body is decoded."""
        return self._looks.overloaded or self._records.overloaded

    async def score(self, asked: ScoringRequest) -> Decision:
        """Decide, or find what was decided for the same request id.

        Raises:
            Conflict: the request id is another user's.
            Overloaded: too much waits already; nothing was stored.
            StoreUnavailable: the database does not answer.
        """
        if self.overloaded:
            raise Overloaded(BOUNDS.kind)
        started = self._clock.monotonic()
        for _ in range(TRIES):
            if (decision := await self._try(asked, started)) is not None:
                return decision
        raise StoreUnavailable("users were erased again and again meanwhile; nothing was stored")

    async def explain(self, decision_id: str) -> tuple[Decision, DecisionOutcome]:
        """A decision, and what came of it; raises `NotFound`."""
        found = await self._book.find(decision_id)
        if found is None:
            raise NotFound(f"there is no decision {decision_id!r}; it may have been pruned or erased")
        return found

    async def close(self) -> None:
        """Finish what was begun, the shadow's part included."""
        await self._looks.close()
        await self._records.close()
        await self._shadower.close()

    async def _try(self, asked: ScoringRequest, started: float) -> Decision | None:
        question = Question(asked.user_id, asked.request_id)
        if (erasures := self._erasures) is None:
            erasures = (await self._looks.submit(question)).erasures
        looking = self._looks.submit(question)
        profile = await self._read_profile(asked.user_id) if asked.origin == "service" else asked.profile
        known = await looking
        self._erasures = known.erasures
        if known.stored is not None:
            return _repeated(known.stored, asked)
        decision, unshadowed = self._decide(asked, profile, known, started)
        recorded = await self._records.submit(Proposed(decision, erasures))
        self._erasures = recorded.erasures
        if recorded.decision is None:
            return None
        if recorded.decision is not decision:
            return _repeated(recorded.decision, asked)
        self._metrics.bandit.decisions.labels(decision.served_by, decision.origin).inc()
        self._shadower.add(unshadowed._replace(elapsed_us=self._elapsed_us(started)))
        return decision

    def _decide(
        self, asked: ScoringRequest, profile: Profile, known: Known, started: float
    ) -> tuple[Decision, Unshadowed]:
        evidence, spec = self._lineup.brought_up(known.evidence)
        role = self._role(asked.user_id, known.share)
        policy = self._lineup.policy(role)
        terms = terms_of(asked.candidates, asked.context, profile)
        phi = policy.spec.joined(*terms)
        decision_id = self._new_id()
        scored = policy.decide(decision_id, evidence, known.prior.mu, phi)
        ranking = ranking_of(scored.means, scored.pi, asked.explore)
        shown = chosen(ranking, decision_id, asked.explore)
        decision = Decision(
            id=decision_id,
            request_id=asked.request_id,
            user_id=asked.user_id,
            created_at_ms=self._clock.now_ms(),
            explore=asked.explore,
            role=role,
            served_by=policy.id,
            policy_hash=policy.spec.hash,
            spec_hash=spec.hash,
            state_version=evidence.decisions,
            prior_version=known.prior.version,
            origin=asked.origin,
            profile=profile,
            profile_present=_present(profile),
            candidates=asked.candidates,
            context=asked.context,
            chosen=shown,
            elapsed_us=self._elapsed_us(started),
            theta=scored.theta,
            phi=_logged(spec, terms, shown),
            champion=ranking if role == "champion" else None,
            challenger=ranking if role == "challenger" else None,
        )
        unshadowed = Unshadowed(
            decision_id, role, asked.explore, shown, decision.elapsed_us, ranking, evidence, known.prior.mu, terms
        )
        return decision, unshadowed

    def _role(self, user_id: str, share: float) -> Role:
        served = self._lineup.challenger is not None and self._serves_challenger(user_id, share)
        return "challenger" if served else "champion"

    def _elapsed_us(self, started: float) -> int:
        return round((self._clock.monotonic() - started) * 1e6)


def _logged(spec: Spec, terms: Inputs, shown: int) -> Array:
    """The vector of the shown candidate, with the inputs that only the other policy reads."""
    return spec.joined(terms.by_candidate[shown : shown + 1], terms.shared).reshape(-1)


def _repeated(stored: Decision, asked: ScoringRequest) -> Decision:
    if stored.user_id != asked.user_id:
        reason = f"{asked.request_id!r} was used for another user"
        raise Conflict(f"nothing was decided: request_id {reason}", [Issue("request_id", reason)])
    return stored


def _present(profile: Profile) -> bool:
    return profile is not None and any(profile.get(name) is not None for name in PROFILE_FEATURES)
