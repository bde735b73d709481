"""Simulated decision logs of policies whose true values are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from app.bandit.model.inputs import Array
from app.bandit.rollout.aggregates import DecisionPage

EPSILON = 0.1


class SimulatedLog(NamedTuple):
    """Decisions with the true mean reward of each candidate: one row per decision, one column per candidate."""

    users: npt.NDArray[np.int64]
    champion: Array
    challenger: Array
    means: Array  # expected reward

    @property
    def values(self) -> tuple[float, float]:
        """True values of champion and challenger on these decisions."""
        champion, challenger = (float((pi * self.means).sum(axis=1).mean()) for pi in (self.champion, self.challenger))
        return champion, challenger


def mixture(scores: Array, sharpness: float) -> Array:
    """π (n, K): ε-uniform, else softmax of the scores."""
    weights = np.exp(sharpness * (scores - scores.max(axis=1, keepdims=True)))
    size = scores.shape[1]
    mixed: Array = (1 - EPSILON) * weights / weights.sum(axis=1, keepdims=True) + EPSILON / size
    return mixed


def simulate(
    random: np.random.Generator,
    users: int,
    decisions: int,
    *,
    candidates: int = 5,
    skill: float = 0.0,
    spread: float = 1.5,
    spread_of_skill: float = 0.0,
    shares: Array | None = None,
) -> SimulatedLog:
    """`skill`: weight of the true reward in the challenger's scores; at 0 both policies are equally good. Its standard
    deviation over users is `spread_of_skill`. `shares`: each user's share of the decisions; None for equal ones."""
    user = random.integers(0, users, decisions) if shares is None else random.choice(users, decisions, p=shares)
    level = random.beta(2, 5, users)[user, None]
    taste = random.normal(size=(decisions, candidates))
    means = np.clip(level * (1 + 0.4 * taste), 0, 1)
    guesses = [spread * random.normal(size=taste.shape) for _ in range(2)]
    weight = skill + spread_of_skill * random.normal(size=users)[user, None] if spread_of_skill else skill
    return SimulatedLog(user, mixture(guesses[0], 1.0), mixture(guesses[1] + weight * taste, 1.0), means)


def logged_page(
    random: np.random.Generator, found: SimulatedLog, *, share: float = 0.0, model: float = 0.0
) -> DecisionPage:
    """The log if the challenger serves that share of users. `model`: quality of the reward model, 0 to 1."""
    rows = np.arange(len(found.users))
    serving = np.where((found.users % 100 < share * 100)[:, None], found.challenger, found.champion)
    chosen = (serving.cumsum(axis=1) > random.random((len(rows), 1))).argmax(axis=1)
    rewards = (random.random(len(rows)) < found.means[rows, chosen]).astype(float)
    expected = model * found.means + (1 - model) * found.means.mean() * (model > 0)
    return DecisionPage(
        users=[f"user-{user}" for user in found.users],
        rewards=rewards,
        pi_b=serving[rows, chosen],
        pi_champion=found.champion[rows, chosen],
        pi_challenger=found.challenger[rows, chosen],
        q_logged=expected[rows, chosen],
        v_champion=(found.champion * expected).sum(axis=1),
        v_challenger=(found.challenger * expected).sum(axis=1),
        dismissed=((rewards == 0) & (random.random(len(rows)) < 0.3)).astype(float),
        agreed=(found.champion.argmax(axis=1) == found.challenger.argmax(axis=1)).astype(float),
        pi_pool=np.full(len(rows), np.nan),
        v_pool=np.full(len(rows), np.nan),
    )


def page_slice(page: DecisionPage, start: int, end: int) -> DecisionPage:
    return DecisionPage(page.users[start:end], *(column[start:end] for column in page[1:]))
