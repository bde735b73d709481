"""The bandit's metrics: a part of `app.telemetry.Metrics`, under the same rules.

A gauge whose value this process does not know is no series, rather than a 0.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class LateGauge:
    """A gauge that is a series only once it was set."""

    def __init__(self, name: str, text: str, collectors: CollectorRegistry) -> None:
        self._gauge = Gauge(name, text, registry=None)
        self._collectors = collectors
        self._told = False

    def set(self, value: float) -> None:
        """From now on it is told."""
        self._gauge.set(value)
        if not self._told:
            self._told = True
            self._collectors.register(self._gauge)


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
            "Events about a decision, by what came of them.",
            ("outcome",),
            registry=collectors,
        )
        self.settled = Counter(
            "profiles_decisions_settled_total",
            "Decisions settled by the sweep: default (no feedback in time), expired; set aside: damaged.",
            ("outcome",),
            registry=collectors,
        )
        self.states = LateGauge("profiles_learned_states", "Users with learned evidence.", collectors)
        self.to_grow = LateGauge(
            "profiles_states_to_grow", "Of these, users whose evidence is yet to grow.", collectors
        )
        self.prior = LateGauge(
            "profiles_prior_version", "Version of the newest pooled prior; 0 before the first.", collectors
        )
        self.unreadable = LateGauge(
            "profiles_unreadable_states", "Users whose evidence is damaged and was set aside.", collectors
        )
        self.share = LateGauge(
            "profiles_rollout_share_ratio", "Share of the users whom the challenger serves, 0 to 1.", collectors
        )
        self.late = (self.states, self.to_grow, self.prior, self.unreadable, self.share)
        self.stage = Gauge(
            "profiles_rollout_stage",
            "1 for the stage that the roll-out is at, 0 for the others.",
            ("stage",),
            registry=collectors,
        )
