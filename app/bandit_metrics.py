"""The bandit's metrics: a part of `app.telemetry.Metrics`, under the same rules."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class BanditMetrics:
    """The metrics of scoring and learning in one process."""

    def __init__(self, collectors: CollectorRegistry) -> None:
        self.decisions = Counter(
            "profiles_decisions_total",
            "Decisions stored, by the policy that served and where the profile came from.",
            ("policy", "profile"),
            registry=collectors,
        )
        self.shadows = Counter(
            "profiles_shadows_total",
            "Decisions whose shadow was stored, dropped (too many waited) or lost.",
            ("outcome",),
            registry=collectors,
        )
        self.events = Counter(
            "profiles_decision_events_total",
            "Events joined to a decision, by what came of them.",
            ("outcome",),
            registry=collectors,
        )
        self.settled = Counter(
            "profiles_decisions_settled_total",
            "Decisions settled by the sweep: default (no feedback in time), expired; set aside: damaged.",
            ("outcome",),
            registry=collectors,
        )
        self.states = Gauge("profiles_learned_states", "Users with learned evidence.", registry=collectors)
        self.to_grow = Gauge(
            "profiles_states_to_grow", "Of these, users whose evidence is yet to grow.", registry=collectors
        )
        self.unreadable = Gauge(
            "profiles_unreadable_states", "Users whose evidence is damaged and was set aside.", registry=collectors
        )
        self.prior = Gauge(
            "profiles_prior_version", "Version of the newest pooled prior; 0 before the first.", registry=collectors
        )
