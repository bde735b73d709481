"""Generated decisions of users with habits, by policies whose true value is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from app.bandit.rollout.aggregates import Page
from app.bandit.rollout.off_policy import Floats

EPSILON = 0.1


class Town(NamedTuple):
    """Decisions with their true means: one row for each decision, one column for each candidate."""

    users: npt.NDArray[np.int64]
    champion: Floats
    challenger: Floats
    means: Floats  # the expected reward of each candidate

    @property
    def values(self) -> tuple[float, float]:
        """The true values of the champion and of the challenger on these decisions."""
        of_champion, of_challenger = (
            float((pi * self.means).sum(axis=1).mean()) for pi in (self.champion, self.challenger)
        )
        return of_champion, of_challenger


def mixture(scores: Floats, sharpness: float) -> Floats:
    """The propensities of a policy that mixes a softmax of the scores with an epsilon of uniform choice."""
    weights = np.exp(sharpness * (scores - scores.max(axis=1, keepdims=True)))
    size = scores.shape[1]
    mixed: Floats = (1 - EPSILON) * weights / weights.sum(axis=1, keepdims=True) + EPSILON / size
    return mixed


def town(
    chance: np.random.Generator,
    users: int,
    decisions: int,
    *,
    candidates: int = 5,
    skill: float = 0.0,
    spread: float = 1.5,
) -> Town:
    """Draw decisions. `skill` is the advantage of the challenger; with 0, both policies have the same value."""
    served = chance.integers(0, users, decisions)
    mood = chance.beta(2, 5, users)[served, None]
    taste = chance.normal(size=(decisions, candidates))
    means = np.clip(mood * (1 + 0.4 * taste), 0, 1)
    guesses = [spread * chance.normal(size=taste.shape) for _ in range(2)]
    return Town(served, mixture(guesses[0], 1.0), mixture(guesses[1] + skill * taste, 1.0), means)


def logged(chance: np.random.Generator, found: Town, *, share: float = 0.0, model: float = 0.0) -> Page:
    """The log if the challenger serves that share of users. `model` is the quality of the reward model, 0 to 1."""
    rows = np.arange(len(found.users))
    serving = np.where((found.users % 100 < share * 100)[:, None], found.challenger, found.champion)
    chosen = (serving.cumsum(axis=1) > chance.random((len(rows), 1))).argmax(axis=1)
    rewards = (chance.random(len(rows)) < found.means[rows, chosen]).astype(float)
    expected = model * found.means + (1 - model) * found.means.mean() * (model > 0)
    return Page(
        users=[f"user-{user}" for user in found.users],
        rewards=rewards,
        pi_b=serving[rows, chosen],
        pi_champion=found.champion[rows, chosen],
        pi_challenger=found.challenger[rows, chosen],
        q_logged=expected[rows, chosen],
        v_champion=(found.champion * expected).sum(axis=1),
        v_challenger=(found.challenger * expected).sum(axis=1),
        dismissed=((rewards == 0) & (chance.random(len(rows)) < 0.3)).astype(float),
        agreed=(found.champion.argmax(axis=1) == found.challenger.argmax(axis=1)).astype(float),
    )


def part(page: Page, start: int, end: int) -> Page:
    """The rows `start` to `end` of a page."""
    return Page(page.users[start:end], *(column[start:end] for column in page[1:]))
