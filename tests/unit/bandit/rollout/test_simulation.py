"""How often guardrails break without a cause, and with one (`tests.bench.rollout_simulation`, on fewer roll-outs)."""

import numpy as np
import pytest

from app.bandit.rollout.verdict import SLOW_SHARE
from tests.bench.rollout_simulation import (
    dismissing,
    first_alarm,
    missed,
    slow_alarms,
    slow_machine_alarms,
    users_roll_out,
)

NEVER = float("inf")
pytestmark = pytest.mark.slow


def test_answers_at_the_limit_are_found_slow_in_few_roll_outs() -> None:
    """30 days at the limit, checked every 20 seconds. At a rate of 1 %, more than 6 of 150 are found in 1 of 1,000."""
    random = np.random.default_rng(1)
    assert sum(slow_alarms(random, 1_000, SLOW_SHARE, 30, 2_000) for _ in range(150)) <= 6
    assert all(slow_alarms(random, 1_000, 4 * SLOW_SHARE, 1, 2_000) for _ in range(20))


@pytest.mark.parametrize("tail", [1.0, 3.0])
def test_equally_slow_policies_break_no_guardrail(tail: float) -> None:
    assert slow_machine_alarms(np.random.default_rng(2), 500, 1_000, tail) == 0


def test_guardrail_on_dismissals_breaks_only_beyond_the_limit() -> None:
    random = np.random.default_rng(3)
    assert [first_alarm(dismissing(random, 30_000, 3_000, 0.03, 0.25)) for _ in range(6)] == [NEVER] * 6
    assert max(first_alarm(dismissing(random, 20_000, 3_000, 0.08, 0.25)) for _ in range(6)) < NEVER


def test_guardrail_on_rewards_of_users_breaks_only_beyond_the_margin() -> None:
    random = np.random.default_rng(4)
    assert [users_roll_out(random, 3_000, 30_000, 0.25, -0.02) for _ in range(4)] == [(NEVER, False)] * 4
    assert max(users_roll_out(random, 3_000, 30_000, 0.25, -0.15)[0] for _ in range(4)) < NEVER


def test_interval_of_the_lift_misses_rarely_when_users_are_unequal() -> None:
    (rate,) = missed(np.random.default_rng(5), 60, 2_000, 0.8, (0.025,))
    assert rate <= 0.09  # see the table in `app/bandit/README.md`
