"""A decision as a row of `tip_scores`, and back; arrays as little-endian float64.

What a caller sent is kept as JSON, as it was sent; numbers come back to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
import numpy as np

from app.bandit.decisions import Decision, DecisionOutcome, Ranking
from app.bandit.model.inputs import STORED, Array, Candidate, Context, packed
from app.features.events import stored_action

NUMBER_BYTES = STORED.itemsize
WRITTEN = (
    "decision_id",
    "request_id",
    "user_id",
    "created_at_ms",
    "explore",
    "role",
    "served_by",
    "policy_hash",
    "spec_hash",
    "state_version",
    "prior_version",
    "profile_origin",
    "profile_present",
    "chosen",
    "chosen_id",
    "elapsed_us",
    "theta",
    "phi",
    "champion_scores",
    "champion_pi",
    "challenger_scores",
    "challenger_pi",
    "request",
)
SETTLED = ("state", "served_at_ms", "reward", "reward_source", "action", "settled_at_ms")


class _Features(msgspec.Struct, array_like=False):
    is_overdue: bool
    task_age_days: float
    priority: float


class _Candidate(msgspec.Struct):
    id: str
    features: _Features


class _StoredRequest(msgspec.Struct):
    candidates: list[_Candidate]
    at: datetime | None
    profile: dict[str, Any] | None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_StoredRequest).decode


def array(stored: bytes) -> Array:
    """An array, as it was stored."""
    return np.frombuffer(stored, STORED).astype(np.float64)


def row_of(decision: Decision) -> tuple[object, ...]:
    """The columns of `WRITTEN`."""
    request = _StoredRequest(
        [
            _Candidate(item.id, _Features(item.is_overdue, item.task_age_days, item.priority))
            for item in decision.candidates
        ],
        decision.context.at,
        None if decision.profile is None else dict(decision.profile),
    )
    return (
        decision.id,
        decision.request_id,
        decision.user_id,
        decision.created_at_ms,
        int(decision.explore),
        decision.role,
        decision.served_by,
        decision.policy_hash,
        decision.spec_hash,
        decision.state_version,
        decision.prior_version,
        decision.origin,
        int(decision.profile_present),
        decision.chosen,
        decision.chosen_id,
        decision.elapsed_us,
        packed(decision.theta),
        packed(decision.phi),
        *_blobs(decision.champion),
        *_blobs(decision.challenger),
        _encode(request).decode(),
    )


def decision_of(row: Mapping[str, Any]) -> Decision:
    """From all columns, by name."""
    request = _decode(row["request"])
    return Decision(
        id=row["decision_id"],
        request_id=row["request_id"],
        user_id=row["user_id"],
        created_at_ms=row["created_at_ms"],
        explore=bool(row["explore"]),
        role=row["role"],
        served_by=row["served_by"],
        policy_hash=row["policy_hash"],
        spec_hash=row["spec_hash"],
        state_version=row["state_version"],
        prior_version=row["prior_version"],
        origin=row["profile_origin"],
        profile=request.profile,
        profile_present=bool(row["profile_present"]),
        candidates=tuple(
            Candidate(item.id, item.features.is_overdue, item.features.task_age_days, item.features.priority)
            for item in request.candidates
        ),
        context=Context(request.at),
        chosen=row["chosen"],
        elapsed_us=row["elapsed_us"],
        theta=array(row["theta"]),
        phi=array(row["phi"]),
        champion=_ranking(row["champion_scores"], row["champion_pi"]),
        challenger=_ranking(row["challenger_scores"], row["challenger_pi"]),
    )


def outcome_of(row: Mapping[str, Any], events: Mapping[Any, int]) -> DecisionOutcome:
    """The columns of `SETTLED`, and the events told of."""
    return DecisionOutcome(
        row["state"],
        row["served_at_ms"],
        row["reward"],
        row["reward_source"],
        None if row["action"] is None else stored_action(row["action"]),
        row["settled_at_ms"],
        dict(events),
    )


def _blobs(ranking: Ranking | None) -> tuple[bytes | None, bytes | None]:
    return (None, None) if ranking is None else (packed(ranking.scores), packed(ranking.pi))


def _ranking(scores: bytes | None, pi: bytes | None) -> Ranking | None:
    return None if scores is None or pi is None else Ranking(array(scores), array(pi))
