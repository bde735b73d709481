"""The decision log as `profiles decisions export` and `GET /decisions` show it: one flat record for each decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NewType

import msgspec
from msgspec import Meta
from msgspec.structs import asdict

from app.bandit.decisions import Decision, DecisionOutcome, DecisionState, Origin, RewardSource, Role
from app.bandit.model.inputs import SPECS, Candidate, Context, ContextFeatures
from app.features.clock import rfc3339
from app.features.events import Action
from app.features.views import view

Vector = list[float] | None
Time = NewType("Time", str)  # RFC 3339 in UTC


class DecisionContext(ContextFeatures, frozen=True, kw_only=True, omit_defaults=False):
    """The context of the scoring request. `at`: when the tip is shown, with the user's UTC offset."""

    at: str | None

    @classmethod
    def of(cls, context: Context) -> DecisionContext:
        return cls(**asdict(context) | {"at": context.at and context.at.isoformat()})


class DecisionRecord(msgspec.Struct, frozen=True):
    """A stored decision with all that it was made from, and its outcome. Lists are in the order of `candidates`."""

    decision_id: str
    decided_at: Time
    user_id: str
    request_id: str | None
    explore: Annotated[bool, Meta(description="False: the first of the ranking was chosen, whatever its propensity.")]
    role: Role
    served_by: str
    policy_hash: str
    spec_hash: Annotated[str, Meta(description="The hash of the list of inputs in `phi`.")]
    state_version: Annotated[int, Meta(description="How many of the user's decisions had been learned.")]
    prior_version: int
    profile_origin: Origin
    profile: Mapping[str, float | int | str | None] | None
    profile_versions: Annotated[
        dict[str, int] | None,
        Meta(
            description="For each value, the number of the user's newest event that it reflects. Null unless the "
            "service read the profile."
        ),
    ]
    profile_read_at: Time | None
    context: DecisionContext
    candidates: Sequence[Candidate]
    phi: Annotated[
        list[list[float]] | None, Meta(description="The input vectors. Null if they belong to another release.")
    ]
    champion_scores: Vector
    champion_pi: Annotated[Vector, Meta(description="Propensities of the champion; null until they are computed.")]
    challenger_scores: Vector
    challenger_pi: Vector
    chosen: Annotated[int, Meta(description="The index of the chosen candidate.")]
    chosen_id: str
    state: DecisionState
    served_at: Time | None
    reward: Annotated[float | None, Meta(description="Null until the decision is learned.")]
    reward_source: RewardSource | None
    action: Action | None
    settled_at: Time | None

    @classmethod
    def of(cls, decision: Decision, outcome: DecisionOutcome) -> DecisionRecord:
        read, spec = decision.profile_read, SPECS.get(decision.spec_hash)
        champion, challenger = decision.champion, decision.challenger
        return view(
            cls,
            decision,
            outcome,
            decision_id=decision.id,
            decided_at=rfc3339(decision.created_at_ms),
            profile_origin=decision.origin,
            profile_versions=read and read.versions,
            profile_read_at=read and rfc3339(read.at_ms),
            context=DecisionContext.of(decision.context),
            phi=spec and decision.phi_under(spec).tolist(),
            champion_scores=champion and champion.scores.tolist(),
            champion_pi=champion and champion.pi.tolist(),
            challenger_scores=challenger and challenger.scores.tolist(),
            challenger_pi=challenger and challenger.pi.tolist(),
            reward_source=outcome.source,
        )
