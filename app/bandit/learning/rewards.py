"""The reward that the bandit learns from each outcome of a decision. `PROFILES_REWARDS` overrides the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from app.errors import SettingsError
from app.features.events import Action

NO_FEEDBACK = "none"


def outcome_rewards(overrides: Iterable[tuple[str, float]] = ()) -> Mapping[str, float]:
    """The reward, within [0, 1], of each outcome. `overrides` are pairs of outcome and reward.

    An outcome is the name of an action, or `NO_FEEDBACK` for a served tip without feedback in time.

    Raises:
        SettingsError: an override names an unknown outcome.
    """
    rewards = {**{action.value: action.reward for action in Action}, NO_FEEDBACK: 0.0}
    for outcome, reward in overrides:
        if outcome not in rewards:
            allowed = ", ".join(rewards)
            raise SettingsError("PROFILES_REWARDS", f"unknown outcome {outcome!r}; outcomes are {allowed}")
        rewards[outcome] = reward
    return rewards
