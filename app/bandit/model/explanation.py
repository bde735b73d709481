"""Why a candidate got its score: what each input of the policy that served added to it."""

from __future__ import annotations

from app.bandit.decisions import Decision
from app.bandit.model.policy import contributions
from app.bandit.model.specs import SPECS


def explained(decision: Decision) -> list[dict[str, float]] | None:
    """By candidate, in the order sent: input name to what it added; each sums to the score.

    None where the spec is of another release: its inputs' formulas are not known here.
    """
    spec = SPECS.get(decision.policy_hash)
    if spec is None:
        return None
    phi = spec.phi(decision.candidates, decision.context, decision.profile)
    return [dict(zip(spec.names, row, strict=True)) for row in (contributions(decision.theta, phi) + 0.0).tolist()]
