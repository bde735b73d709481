"""Checks that each decision was learned once: the statistics of each user equal the sum over the learned decisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from app.bandit.model.specs import SPECS
from app.bandit.model.sufficient_statistics import SufficientStatistics

SELECT_LEARNED = "SELECT user_id, phi, reward FROM tip_scores WHERE state = 'learned'"
SELECT_STATES = "SELECT user_id, spec_hash, evidence, decisions FROM bandit_states"


def learning_faults(learned: Iterable[tuple[Any, ...]], states: Iterable[tuple[Any, ...]]) -> list[str]:
    """One line for each user whose statistics are wrong, given the rows of both statements."""
    decisions: dict[str, list[tuple[Any, float]]] = {}
    for user_id, phi, reward in learned:
        decisions.setdefault(user_id, []).append((np.frombuffer(phi), reward))
    faults: list[str] = []
    for user_id, spec_hash, blob, count in states:
        own = decisions.pop(user_id, [])
        evidence = SufficientStatistics.unpack(SPECS[spec_hash], blob, count)
        s, y = np.zeros_like(evidence.s), np.zeros_like(evidence.y)
        for phi, reward in own:
            s[: len(phi), : len(phi)] += np.outer(phi, phi)
            y[: len(phi)] += reward * phi
        if count != len(own):
            faults.append(f"{user_id}: statistics of {count} decisions, but {len(own)} are learned")
        elif not (np.allclose(evidence.s, s, atol=1e-9) and np.allclose(evidence.y, y, atol=1e-9)):
            faults.append(f"{user_id}: the statistics are not the sum over {count} decisions")
    faults += [
        f"{user_id}: {len(own)} decisions are learned, but there are no statistics"
        for user_id, own in decisions.items()
    ]
    return faults
