"""The reward of each outcome of a decision: that of the action, unless `PROFILES_REWARDS` overrides it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from app.errors import SettingsError
from app.features.events import Action

NO_FEEDBACK = "none"


def outcome_rewards(overrides: Iterable[tuple[str, float]] = ()) -> Mapping[str, float]:
    """Rewards in [0, 1] by outcome: each action, and `NO_FEEDBACK` for a served tip without feedback in time.

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
