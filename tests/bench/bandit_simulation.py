"""Simulates users whose rewards follow other formulas than v2's inputs: does the pooled prior pay?

    python -m tests.bench.bandit_simulation --populations 40 --users 300
    python -m tests.bench.bandit_simulation --grown-after 60

The arms, v1, v2 and v1 with a pooled prior, see the same users, candidates, random numbers and outcomes. Each arm
learns from its own decisions only, and its prior is pooled from the population's statistics every few rounds, as a
worker does. Users arrive one after another, so most of them start from a prior that others have taught. The result is
the expected reward of the chosen candidate, per population.

With `--grown-after`, all users begin at the same time, v1 makes their first decisions, and v2 the others. v2 has
learned the first ones padded with zeros, or by replay.

A decision here takes one draw of the posterior. The policy takes M draws and samples from their shares. The action has
the same distribution, since each draw is equally likely to be the one that counts. `test_simulation` compares the
arithmetic here (all users at once) with `app.bandit.model.thompson_sampling`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.bandit.model.inputs import SPEC_V1, SPEC_V2, Array, Context, Profile, Spec, candidate_factors, shared_factors
from app.bandit.model.sufficient_statistics import SHRINKAGE
from app.bandit.model.thompson_sampling import EPSILON, POOLED_CHAMPION, SCALE
from tests.support.score_requests import tip

COLD = 20  # a user's first decisions
FEW = -0.84  # a fifth of the normal distribution lies below


@dataclass(frozen=True)
class Size:
    populations: int = 8
    users: int = 120
    rounds: int = 60
    candidates: int = 6
    refresh: int = 3  # rounds between two pooled priors
    without_profile: float = 0.15


class SimulatedUsers(NamedTuple):
    """Everything that does not depend on the choices: N users of all populations, R rounds, K candidates."""

    population: NDArray[np.intp]  # (N,)
    start: NDArray[np.intp]  # (N,) the round of a user's first decision
    factors: Array  # (N, R, K, candidate factors)
    shared: Array  # (N, R, shared factors)
    traits: Array  # (N, R, K, 8): the effects that the reward depends on, see `_traits`
    own: Array  # (N, 3) each user's own preferences
    outcomes: Array  # (N, R, K) uniform: decides the reward of each candidate
    noise: Array  # (N, R, K) normal: the draws
    exploration: Array  # (N, R, 2) uniform: whether to explore, and the candidate


def simulated_users(size: Size, seed: int) -> SimulatedUsers:
    random = np.random.default_rng(seed)
    n, r, k = size.populations * size.users, size.rounds, size.candidates
    overdue = random.random((n, r, k)) < 0.4
    age = random.lognormal(2.0, 1.3, (n, r, k))
    priority = random.integers(0, 5, (n, r, k))
    tips = [
        tip("", bool(o), float(a), float(p))
        for o, a, p in zip(overdue.ravel(), age.ravel(), priority.ravel(), strict=True)
    ]
    kind = random.dirichlet((2.0, 2.0, 1.5), n)  # completes, dismisses, snoozes
    dwell = random.lognormal(8.5, 1.0, n)
    preferred = np.round(random.choice([8, 12, 20], n) + random.normal(0, 2, n)) % 24
    volume = random.negative_binomial(2, 0.05, n)
    hour = random.integers(6, 23, (n, r)) + random.integers(0, 60, (n, r)) / 60
    known = random.random(n) >= size.without_profile
    shared = np.array(
        [
            [
                shared_factors(Context(datetime(2026, 3, 2) + timedelta(hours=float(h))), profile)  # noqa: DTZ001
                for h in hours
            ]
            for profile, hours in zip(_profiles(random, kind, dwell, preferred, volume, known), hour, strict=True)
        ]
    )
    apart = np.abs((hour - preferred[:, None] + 12) % 24 - 12)
    return SimulatedUsers(
        np.repeat(np.arange(size.populations), size.users),
        random.integers(0, r - COLD + 1, n),
        candidate_factors(tips).reshape(n, r, k, -1),
        shared,
        _traits(overdue, age, priority, kind, dwell, volume, apart),
        random.normal(0, 1, (n, 3)),
        random.random((n, r, k)),
        random.normal(size=(n, r, k)),
        random.random((n, r, 2)),
    )


def _profiles(
    random: np.random.Generator,
    kind: Array,
    dwell: Array,
    preferred: Array,
    volume: NDArray[np.int64],
    known: NDArray[np.bool_],
) -> Sequence[Profile]:
    """Each user's profile, with rates as counted over the feedback received, not the true ones."""
    found: list[Profile] = []
    for user, there in enumerate(known):
        n = int(volume[user])
        if not there:
            found.append(None)
            continue
        counts = random.multinomial(n, kind[user])
        rates = (counts / n).tolist() if n else [None, None, None]
        found.append(
            {
                "completion_rate_30d": rates[0],
                "dismiss_rate_30d": rates[1],
                "mean_dwell_ms_30d": float(dwell[user] * np.exp(random.normal(0, 0.2))) if n else None,
                "preferred_hour": int(preferred[user]) if counts[0] else None,
                "tip_volume_30d": n,
            }
        )
    return found


def _traits(
    overdue: NDArray[np.bool_],
    age: Array,
    priority: NDArray[np.int64],
    kind: Array,
    dwell: Array,
    volume: NDArray[np.int64],
    apart: Array,
) -> Array:
    """(N, R, K, 3 + 5): effects of the candidate alone, and of candidate and user together.

    They are steps, bumps and roots on purpose, so that none is a transform of v2.
    """
    o = overdue - 0.4
    a = np.sqrt(np.minimum(age, 100) / 100) - 0.3
    p = (priority - 2) / 2
    eager = np.tanh(4 * (kind[:, 0] - 0.36))[:, None, None]
    curt = (kind[:, 1] > 0.4)[:, None, None]
    reader = (dwell > 6000)[:, None, None]
    busy = (np.sqrt(volume) / 6 - 1)[:, None, None]
    near = (np.exp(-((apart / 3) ** 2)) - 0.3)[:, :, None]
    return np.stack([o, a, p, eager * p, (curt - 0.4) * o, (reader - 0.5) * a, near * o, busy * a], axis=-1)


Rewards = Callable[[SimulatedUsers], Array]
_MAIN = np.array([0.3, -0.4, 0.3])
_TOGETHER = np.array([1.0, -1.6, 2.0, 1.6, -0.8])


def _logistic(utility: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(0.6 - utility)), np.float64)


def _own(at: SimulatedUsers, spread: float = 0.8) -> Array:
    return np.asarray(np.einsum("nrke,ne->nrk", at.traits[..., :3], at.own * spread), np.float64)


def _common(at: SimulatedUsers) -> Array:
    return np.asarray(at.traits[..., :3] @ _MAIN + at.traits[..., 3:] @ _TOGETHER, np.float64)


def shared(at: SimulatedUsers) -> Array:
    """A profile has the same effect for all users, who also have own preferences."""
    return _logistic(_common(at) + _own(at))


def shared_linear(at: SimulatedUsers) -> Array:
    """As `shared`, but linear in its effects."""
    return np.clip(0.35 + 0.15 * (_common(at) + _own(at)), 0, 1)


def main_only(at: SimulatedUsers) -> Array:
    """Users have preferences in common, but the profile has no effect."""
    return _logistic(at.traits[..., :3] @ (2 * _MAIN) + _own(at))


def nothing_shared(at: SimulatedUsers) -> Array:
    """Users have nothing in common."""
    return _logistic(_own(at, 1.2))


def opposite(at: SimulatedUsers) -> Array:
    """Half of the users have the opposite preferences of the other half."""
    sign = np.where(at.own[:, 0] > 0, 1.0, -1.0)[:, None, None]
    return _logistic(sign * _common(at))


def minority(at: SimulatedUsers) -> Array:
    """As `opposite`, but for one user in five."""
    sign = np.where(at.own[:, 0] > FEW, 1.0, -1.0)[:, None, None]
    return _logistic(sign * _common(at))


def constant(at: SimulatedUsers) -> Array:
    """Every candidate has the same expected reward."""
    return np.full(at.outcomes.shape, 0.35)


SCENARIOS: dict[str, Rewards] = {
    scenario.__name__: scenario
    for scenario in (shared, shared_linear, main_only, nothing_shared, opposite, minority, constant)
}


@dataclass(frozen=True)
class Arm:
    spec: Spec
    precisions: Array
    v: float = SCALE
    shrinkage: float = SHRINKAGE


V1 = Arm(SPEC_V1, SPEC_V1.precisions)
V2 = Arm(SPEC_V2, SPEC_V2.precisions)
POOL = Arm(POOLED_CHAMPION.spec, SPEC_V1.precisions)


def features(at: SimulatedUsers, spec: Spec) -> Array:
    """φ of all candidates (N, R, K, D)."""
    candidate, shared = spec.places
    return at.factors.take(candidate, axis=-1) * at.shared.take(shared, axis=-1)[..., None, :]


class Learners:
    """What one arm has learned of N users: A⁻¹ and y of each, and the pooled sums of each population."""

    def __init__(self, arm: Arm, population: NDArray[np.intp]) -> None:
        self._arm = arm
        self._population = population
        n, d, populations = len(population), arm.spec.size, int(population.max()) + 1
        self.inverse = np.tile(np.diag(1 / arm.precisions), (n, 1, 1))
        self.y = np.zeros((n, d))
        self.mu: Array = np.zeros((populations, d))
        self._pool_s, self._pool_y = np.zeros((populations, d, d)), np.zeros((populations, d))

    def refresh(self) -> None:
        """Pool a new prior in each population, if the arm's spec is pooled."""
        if self._arm.spec.pooled:
            a = self._pool_s + self._arm.shrinkage * np.eye(self.y.shape[1])
            self.mu = np.asarray(np.linalg.solve(a, self._pool_y[..., None])[..., 0], np.float64)

    def scores(self, users: NDArray[np.intp], phi: Array) -> tuple[Array, Array]:
        """Means (n, K) and covariances φA⁻¹φᵀ (n, K, K) of candidates φ (n, K, D) of n users."""
        inverse = self.inverse[users]
        towards = self._arm.precisions * self.mu[self._population[users]] + self.y[users]
        theta = np.einsum("nde,ne->nd", inverse, towards)
        return np.einsum("nkd,nd->nk", phi, theta), phi @ inverse @ phi.transpose(0, 2, 1)

    def learn(self, users: NDArray[np.intp], phi: Array, reward: Array) -> None:
        """Learn one decision of each of n users: φ (n, D) of the chosen candidate, and its reward (n,)."""
        seen = np.einsum("nde,ne->nd", self.inverse[users], phi)
        # Sherman-Morrison update of A⁻¹.
        self.inverse[users] -= seen[:, :, None] * seen[:, None, :] / (1 + (seen * phi).sum(axis=1))[:, None, None]
        self.y[users] += reward[:, None] * phi
        np.add.at(self._pool_s, self._population[users], phi[:, :, None] * phi[:, None, :])
        np.add.at(self._pool_y, self._population[users], reward[:, None] * phi)


class Growth(NamedTuple):
    """In the first rounds v1 chooses. `replayed`: v2 learns these decisions with all inputs, not padded with zeros."""

    rounds: int
    replayed: bool = True


FROM_THE_START = Growth(0)


def run(
    arm: Arm, at: SimulatedUsers, phi: Array, expected: Array, refresh: int, growth: Growth = FROM_THE_START
) -> Array:
    """The expected reward of the chosen candidates (N, R); NaN before a user's first decision."""
    users, rounds, candidates, _ = phi.shape
    learners, first = Learners(arm, at.population), Learners(V1, at.population)
    got = np.full((users, rounds), np.nan)
    for turn in range(rounds):
        if turn % refresh == 0:
            learners.refresh()
        here = np.flatnonzero(at.start <= turn)
        grown = turn >= growth.rounds
        if grown:
            means, spread = learners.scores(here, phi[here, turn])
        else:
            means, spread = first.scores(here, phi[here, turn, :, : SPEC_V1.size])
        root = np.linalg.cholesky(spread + 1e-9 * np.eye(candidates))
        drawn = means + arm.v * np.einsum("nkj,nj->nk", root, at.noise[here, turn])
        explore = at.exploration[here, turn]
        chosen = np.where(explore[:, 0] < EPSILON, (explore[:, 1] * candidates).astype(int), drawn.argmax(axis=1))
        mean, draw = expected[here, turn, chosen], at.outcomes[here, turn, chosen]
        reward = np.where(draw < mean, 1.0, np.where(draw < mean + 0.2 * (1 - mean), 0.3, 0.0))
        seen = phi[here, turn, chosen]
        if not grown:
            first.learn(here, seen[:, : SPEC_V1.size], reward)
            if not growth.replayed:
                seen[:, SPEC_V1.size :] = 0
        learners.learn(here, seen, reward)
        got[here, turn] = mean
    return got


class Lift(NamedTuple):
    """v2 minus v1 in expected reward per decision: mean and standard error over populations."""

    mean: float
    error: float
    v1: float
    v2: float


def lift(
    at: SimulatedUsers, first: Array, second: Array, decisions: slice, users: NDArray[np.bool_] | None = None
) -> Lift:
    """Compare the decisions with numbers in `decisions`, of all or some users, population by population."""
    number = np.arange(first.shape[1]) - at.start[:, None]
    counted = (number >= (decisions.start or 0)) & (number < (decisions.stop or first.shape[1]))
    if users is not None:
        counted &= users[:, None]
    populations = at.population[:, None] == np.arange(at.population[-1] + 1)[:, None, None]
    means = np.array([[got[mine & counted].mean() for mine in populations] for got in (first, second)])
    gaps = means[1] - means[0]
    error = float(gaps.std(ddof=1) / np.sqrt(len(gaps)))
    return Lift(float(gaps.mean()), error, float(means[0].mean()), float(means[1].mean()))


PARTS = {"first 20": slice(0, COLD), "later": slice(COLD, None), "all": slice(None)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--populations", type=int, default=20)
    arguments.add_argument("--users", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--grown-after", type=int, default=0, help="the number of decisions under v1")
    asked = arguments.parse_args()
    size = Size(asked.populations, asked.users, asked.rounds)
    at = simulated_users(size, asked.seed)
    if asked.grown_after:
        _print_growth(size, at._replace(start=np.zeros_like(at.start)), asked.grown_after)
        return
    one, two = features(at, SPEC_V1), features(at, SPEC_V2)
    print("lift of v2 over v1 (± standard error), expected reward per decision")
    for name, rewards in SCENARIOS.items():
        expected = rewards(at)
        first = run(V1, at, one, expected, size.refresh)
        second = run(V2, at, two, expected, size.refresh)
        pooled = run(POOL, at, one, expected, size.refresh)
        blind, best = float(expected.mean()), float(expected.max(axis=2).mean())
        print(f"{name:15} blind {blind:.4f}, best {best:.4f}")
        for label, part in PARTS.items():
            pool = lift(at, first, pooled, part)
            print(
                f"    {label:9} {_row(lift(at, first, second, part))}; pool {pool.mean:+.4f} ± {pool.error:.4f}",
                flush=True,
            )
        if rewards is minority:
            print(f"    minority {_row(lift(at, first, second, slice(None), at.own[:, 0] <= FEW))}")


def _print_growth(size: Size, at: SimulatedUsers, rounds: int) -> None:
    one, two = features(at, SPEC_V1), features(at, SPEC_V2)
    print(f"lift over v1 (± standard error) of v2 from decision {rounds} on")
    arms = {"padded": Growth(rounds, replayed=False), "replayed": Growth(rounds), "v2 from the start": FROM_THE_START}
    for name, rewards in SCENARIOS.items():
        expected = rewards(at)
        stayed = run(V1, at, one, expected, size.refresh)
        grown = {label: run(V2, at, two, expected, size.refresh, growth) for label, growth in arms.items()}
        for label, part in (("next 20", slice(rounds, rounds + COLD)), ("all later", slice(rounds, None))):
            lifts = {arm: lift(at, stayed, got, part) for arm, got in grown.items()}
            shown = ", ".join(f"{arm} {found.mean:+.4f} ± {found.error:.4f}" for arm, found in lifts.items())
            print(f"{name:15} {label:9} v1 {lifts['padded'].v1:.4f}, {shown}", flush=True)


def _row(found: Lift) -> str:
    return f"v1 {found.v1:.4f}, v2 {found.v2:.4f}: {found.mean:+.4f} ± {found.error:.4f}"


if __name__ == "__main__":
    main()
