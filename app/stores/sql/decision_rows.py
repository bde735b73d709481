"""Encodes a decision as a row of `tip_scores`, and decodes it without loss. Arrays are stored as little-endian float64.
The content of the request is stored as JSON."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from app.bandit.decisions import Decision, DecisionOutcome
from app.bandit.model.inputs import PROFILE_FEATURES, SPECS, STORED, Array, Candidate, Context, Profile, packed
from app.bandit.model.thompson_sampling import OTHER, Ranking, Role
from app.bandit.numpy_on_demand import np
from app.features.events import stored_action
from app.stores.sql.logged_profiles import profile_read_of


class _StoredRequest(msgspec.Struct):
    candidates: tuple[Candidate, ...]
    at: datetime | None
    profile: Profile
    context: Context = Context()  # without `at`; earlier releases stored no other


# Columns with the value of the field of the same name.
_SAME = (
    *("request_id", "user_id", "created_at_ms", "role", "served_by", "policy_hash", "spec_hash", "state_version"),
    *("prior_version", "chosen", "elapsed_us"),
)
_NONE: Mapping[Any, int] = {}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_StoredRequest).decode


def array(stored: bytes, size: int = -1) -> Array:
    """Decode an array of little-endian float64. Raises `ValueError` if its length is not `size` (-1: any)."""
    return np.frombuffer(stored, STORED).astype(np.float64).reshape(size)


def row_of(decision: Decision) -> dict[str, object]:
    """The values of a new row of `tip_scores`, by column."""
    profile = None if decision.profile is None else dict(decision.profile)
    present = profile is not None and any(profile.get(name) is not None for name in PROFILE_FEATURES)
    context = replace(decision.context, at=None)
    rankings = {decision.role: decision.ranking, OTHER[decision.role]: decision.shadow}
    return {
        **{name: getattr(decision, name) for name in _SAME},
        "decision_id": decision.id,
        "explore": int(decision.explore),
        "profile_origin": decision.origin,
        "profile_read": None if decision.profile_read is None else _encode(decision.profile_read).decode(),
        "profile_present": int(present),
        "chosen_id": decision.chosen_id,
        "theta": packed(decision.theta),
        "phi": packed(decision.phi),
        **{f"{role}_scores": ranking and packed(ranking.scores) for role, ranking in rankings.items()},
        **{f"{role}_pi": ranking and packed(ranking.pi) for role, ranking in rankings.items()},
        "request": _encode(_StoredRequest(decision.candidates, decision.context.at, profile, context)).decode(),
    }


def decision_of(row: Mapping[str, Any]) -> Decision:
    """Decode a decision from a row of `tip_scores`, a mapping by column. Raises `DAMAGE` if the row is damaged."""
    request = _decode(row["request"])
    other = OTHER[row["role"]]
    computed = None not in (row[f"{other}_scores"], row[f"{other}_pi"])
    if not 0 <= row["chosen"] < len(request.candidates):
        raise ValueError(f"candidate {row['chosen']} of {len(request.candidates)} was chosen")
    return Decision(
        **{name: row[name] for name in _SAME},
        id=row["decision_id"],
        explore=bool(row["explore"]),
        origin=row["profile_origin"],
        profile=request.profile,
        profile_read=profile_read_of(row["profile_read"]),
        candidates=request.candidates,
        context=replace(request.context, at=request.at),
        theta=array(row["theta"], _size(row["policy_hash"])),
        phi=array(row["phi"], _size(row["spec_hash"])),
        ranking=_ranking(row["role"], row, len(request.candidates)),
        shadow=_ranking(other, row, len(request.candidates)) if computed else None,
    )


def outcome_of(row: Mapping[str, Any], events: Mapping[Any, int] = _NONE) -> DecisionOutcome:
    """Decode state and reward from a row of `tip_scores`. `events`: number of the decision's events by outcome."""
    action = None if row["action"] is None else stored_action(row["action"])
    return DecisionOutcome(
        row["state"], row["served_at_ms"], row["reward"], row["reward_source"], action, row["settled_at_ms"], events
    )


def _ranking(role: Role, row: Mapping[str, Any], candidates: int) -> Ranking:
    return Ranking(array(row[f"{role}_scores"] or b"", candidates), array(row[f"{role}_pi"] or b"", candidates))


def _size(spec_hash: str) -> int:
    return SPECS[spec_hash].size if spec_hash in SPECS else -1
