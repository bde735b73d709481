"""From the roll-out's status to its answer."""

from __future__ import annotations

from app.api.admin.rollout_schemas import (
    DecisionsView,
    DismissalsView,
    FiguresView,
    GuardrailsView,
    GuardrailView,
    IntervalView,
    LookView,
    MoveView,
    RolloutView,
    StatesView,
    VerdictView,
)
from app.bandit.model.policies import Policies
from app.bandit.rollout.bootstrap_intervals import Interval
from app.bandit.rollout.controller import Status
from app.bandit.rollout.ports import RolloutLook
from app.bandit.rollout.verdict import Guardrails, Limits, Verdict, broken, effective_needed, longest_allowed
from app.features.clock import rfc3339


def view(found: Status, lineup: Policies) -> RolloutView:
    """All of it."""
    state, counts = found.state, found.counts
    return RolloutView(
        stage=state.stage,
        share=state.share,
        reason=state.reason,
        changed_by=state.changed_by,
        changed_at=rfc3339(state.changed_at_ms) if state.changed_at_ms else None,
        champion=lineup.champion.id,
        challenger=lineup.challenger.id if lineup.challenger is not None else None,
        margin=found.limits.margin,
        verdict=_verdict(found.verdict),
        decisions=DecisionsView(counts.evaluated, counts.waiting, counts.unshadowed, counts.served, found.next_look_at),
        figures=_figures(found.looks[-1]) if found.looks else None,
        guardrails=_guardrails(found.rails, found.limits),
        looks=[_look(look) for look in found.looks],
        moves=[MoveView(move, why_not is None, why_not) for move, why_not in found.refusals.items()],
        states=StatesView(*found.growth),
    )


def _verdict(said: Verdict) -> VerdictView:
    return VerdictView(said.word, said.reason, said.improved)


def _interval(found: Interval) -> IntervalView:
    return IntervalView(*found)


def _figures(look: RolloutLook) -> FiguresView:
    found = look.estimates
    return FiguresView(
        look=look.number,
        made_at=rfc3339(look.at_ms),
        decisions=found.n,
        users=found.users,
        level=look.level,
        agreement=found.agreement,
        ips=_interval(found.ips),
        snips=_interval(found.snips),
        doubly_robust=_interval(found.dr),
        champion=_interval(found.champion),
        lift=_interval(found.lift),
        mean_weight=found.mean_weight,
        mean_weight_error=found.mean_weight_error,
        effective_sample_size=found.ess,
        champion_mean_weight=found.champion_mean_weight,
        champion_mean_weight_error=found.champion_mean_weight_error,
        champion_effective_sample_size=found.champion_ess,
        effective_sample_size_needed=effective_needed(found.n),
    )


def _guardrails(rails: Guardrails, limits: Limits) -> GuardrailsView:
    more = rails.dismissed_more
    return GuardrailsView(
        DismissalsView(
            rails.dismissed_champion,
            rails.dismissed_challenger,
            _interval(more) if more is not None else None,
            limits.dismissed,
        ),
        GuardrailView(rails.p99_ms, longest_allowed(rails, limits), rails.p99_judged),
        GuardrailView(rails.no_profile, limits.no_profile),
        broken(rails, limits),
    )


def _look(look: RolloutLook) -> LookView:
    found = look.estimates
    return LookView(
        look.number,
        rfc3339(look.at_ms),
        found.n,
        found.users,
        look.words,
        _interval(found.lift),
        found.mean_weight,
        min(found.ess, found.champion_ess),
        _verdict(look.verdict),
    )
