"""Requests, profiles and learned statistics: Hypothesis strategies, and examples that depend on a seed alone."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
from hypothesis import strategies as st

from app.bandit.model.inputs import SPEC_V2, Array, Candidate, Context, Features, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import Policy, roots


def tip(
    id_: str, is_overdue: bool = False, task_age_days: float = 1.0, priority: float = 1.0, **others: bool | float | str
) -> Candidate:
    features = {"is_overdue": is_overdue, "task_age_days": task_age_days, "priority": priority, **others}
    return Candidate(id_, Features(**features))


numbers = st.floats(allow_nan=False, allow_infinity=False)
candidates = st.builds(
    tip,
    st.just("tip"),
    is_overdue=st.booleans(),
    task_age_days=st.one_of(st.floats(0, 400), st.floats(0, allow_infinity=False)),
    priority=st.one_of(st.floats(-5, 5), st.integers(0, 4).map(float), numbers),
)
offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
times = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=offsets)  # noqa: DTZ001
contexts = st.builds(Context, at=st.one_of(st.none(), times))
values = st.one_of(st.none(), numbers, st.integers(), st.booleans(), st.text(max_size=3))
rates = st.one_of(st.none(), st.floats(0, 1))
likely_profiles = st.fixed_dictionaries(
    {},
    optional={
        "completion_rate_30d": rates,
        "dismiss_rate_30d": rates,
        "mean_dwell_ms_30d": st.one_of(st.none(), st.floats(0, 86_400_000)),
        "preferred_hour": st.one_of(st.none(), st.integers(0, 23)),
        "tip_volume_30d": st.one_of(st.none(), st.integers(0, 5000)),
    },
)
odd_profiles = st.dictionaries(
    st.sampled_from(
        ["completion_rate_30d", "dismiss_rate_30d", "mean_dwell_ms_30d", "preferred_hour", "tip_volume_30d", "other"]
    ),
    st.one_of(values, st.sampled_from([float("nan"), float("inf"), float("-inf"), 10**400, 1.7e308])),
)
profiles = st.one_of(st.none(), likely_profiles, odd_profiles)
seeds = st.integers(0, 2**32 - 1)

MORNING = Context(datetime(2026, 3, 2, 9, 30, tzinfo=UTC))
PROFILE = {
    "completion_rate_30d": 0.8,
    "dismiss_rate_30d": 0.1,
    "mean_dwell_ms_30d": 9000.0,
    "preferred_hour": 8,
    "tip_volume_30d": 40,
}


def request_of(seed: int, count: int = 20, spec: Spec = SPEC_V2, *, known: bool = True) -> Array:
    """φ (K, D) of a request with a random time of day, and with a random profile if `known`."""
    random = np.random.default_rng(seed)
    tips = [
        tip(str(n), bool(random.random() < 0.4), float(random.lognormal(2, 1.3)), float(random.integers(0, 5)))
        for n in range(count)
    ]
    profile = {
        "completion_rate_30d": float(random.random()),
        "dismiss_rate_30d": float(random.random()),
        "mean_dwell_ms_30d": float(random.lognormal(8.5, 1)),
        "preferred_hour": int(random.integers(24)),
        "tip_volume_30d": int(random.integers(200)),
    }
    at = datetime(2026, 3, 2, tzinfo=UTC) + timedelta(hours=float(random.random() * 24))
    return spec.phi(tips, Context(at), profile if known else None)


def history_of(seed: int, decisions: int, spec: Spec = SPEC_V2) -> tuple[Array, Array]:
    """φ (n, D) of chosen candidates and their rewards (n,)."""
    random = np.random.default_rng(seed)
    each = random.integers(2**31, size=decisions)
    chosen = [request_of(int(seed), 1, spec, known=seed % 5 > 0)[0] for seed in each]
    rewards = random.choice([0.0, 0.3, 1.0], decisions)
    return np.array(chosen).reshape(decisions, spec.size), rewards


def taught(phi: Array, rewards: Array, start: SufficientStatistics | None = None) -> SufficientStatistics:
    """`start` (default: none, of v2) after learning these decisions, φ (n, D) and rewards (n,)."""
    start = start or SufficientStatistics.none(SPEC_V2)
    for row, reward in zip(phi, rewards, strict=True):
        start = start.learned(row, float(reward))
    return start


def pool_of(users: Iterable[SufficientStatistics]) -> SufficientStatistics:
    """The sum of the statistics of users under v2, each added alone."""
    total = SufficientStatistics.none(SPEC_V2)
    for statistics in users:
        total = total.plus([statistics.pack()], statistics.decisions)
    return total


def s_of(statistics: SufficientStatistics) -> Array:
    """The matrix S (D, D)."""
    return statistics.leading(statistics.spec.size)[0]


def y_of(statistics: SufficientStatistics) -> Array:
    """The vector y (D,)."""
    return statistics.leading(statistics.spec.size)[1]


def precision_of(policy: Policy, statistics: SufficientStatistics) -> Array:
    """The matrix A = Λ + S (D, D) of the policy's inputs."""
    return statistics.leading(policy.spec.size)[0] + np.diag(policy.spec.precisions)


def variances(policy: Policy, statistics: SufficientStatistics, phi: Array) -> Array:
    """φᵀA⁻¹φ of each candidate, without the factor v²."""
    found = roots(precision_of(policy, statistics), phi[:, : policy.spec.size])
    return np.asarray((found**2).sum(axis=0))


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have the same bits. A function, since pytest takes minutes to explain unequal long bytes."""
    return one.shape == other.shape and one.tobytes() == other.tobytes()
