"""Simulates roll-outs whose truth is known: how often do intervals miss, and guardrails break without or with a cause?

    python -m tests.bench.rollout_simulation coverage dismissals answers users --runs 200

Each roll-out is checked again as decisions arrive, on the windows that `app.bandit.rollout.controller` uses. A *false
alarm* is a roll-out in which a guardrail breaks at least once, although the challenger is within its limit. The worst
case is a challenger at the limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np

from app.bandit.model.inputs import Array
from app.bandit.rollout.aggregates import DecisionPage, DecisionSums, Experiment
from app.bandit.rollout.bootstrap_intervals import GUARDRAIL_LEVEL, binomial_tail, look_level
from app.bandit.rollout.controller import FEWEST_ANSWERS, NEWEST
from app.bandit.rollout.verdict import MISMATCH, SLOW_SHARE, SLOWER
from app.settings import Settings
from tests.support.decision_logs import logged_page, page_slice, simulate

SETTINGS = Settings()
CHECKED_EVERY = 2_000  # decisions
DECISIONS = 60_000  # of a roll-out
USERS = 5_000


def zipf(users: int, exponent: float) -> Array:
    """The share of decisions of each user, by rank to the power of -exponent."""
    weights = np.arange(1.0, users + 1) ** -exponent
    return np.asarray(weights / weights.sum(), np.float64)


def missed(random: np.random.Generator, runs: int, users: int, exponent: float, levels: Sequence[float]) -> Array:
    """The share of looks at 4,000 decisions whose interval of the lift misses the lift of all users, by level."""
    truth = simulate(np.random.default_rng(1), 200_000, 400_000, skill=0.5, spread=0.7, spread_of_skill=0.7).values
    misses = np.zeros(len(levels))
    for _ in range(runs):
        found = simulate(random, users, 4_000, skill=0.5, spread=0.7, spread_of_skill=0.7, shares=zipf(users, exponent))
        sums = DecisionSums()
        sums.add(logged_page(random, found, model=0.5))
        lifts = [sums.estimates(level, random, replicates=1_000).lift for level in levels]
        misses += [not lift.low <= truth[1] - truth[0] <= lift.high for lift in lifts]
    return misses / runs


def dismissing(random: np.random.Generator, decisions: int, users: int, more: float, share: float) -> DecisionPage:
    """A log in which the challenger's tips are dismissed in `more` of the decisions in excess of the champion's.

    The reward model is half right. Users differ in how often they dismiss a tip.
    """
    found = simulate(random, users, decisions, spread=1.2)
    preferred = np.log(found.challenger)
    preferred -= preferred.mean(axis=1, keepdims=True)
    base, effect = random.beta(2, 6, users)[found.users, None], 0.0
    for _ in range(4 if more else 0):  # probabilities are cut at 0 and 1, so the effect is not linear
        dismissal = np.clip(base + effect * preferred, 0, 1)
        excess = float(((found.challenger - found.champion) * dismissal).sum(axis=1).mean())
        slope = float(((found.challenger - found.champion) * preferred).sum(axis=1).mean())
        effect += (more - excess) / slope
    dismissal = np.clip(base + effect * preferred, 0, 1)
    means = found.means * (1 - dismissal)
    page = logged_page(random, found._replace(means=means), share=share, model=0.5)
    rows = np.arange(decisions)
    # The chosen candidate is the one with the logged probabilities.
    chosen = np.argmin(np.abs(found.champion - page.pi_champion[:, None]), axis=1)
    odds = dismissal[rows, chosen] / np.maximum(1 - means[rows, chosen], 1e-9)
    return page._replace(dismissed=((page.rewards == 0) & (random.random(decisions) < odds)).astype(float))


def alarms(page: DecisionPage) -> Iterator[bool]:
    """For each check of a roll-out: whether the guardrail on dismissals is broken."""
    for end in range(CHECKED_EVERY, len(page.users) + 1, CHECKED_EVERY):
        sums = DecisionSums()
        sums.add(page_slice(page, max(0, end - NEWEST), end))
        yield sums.dismissals()[2].low > SETTINGS.rollout_guardrails.dismissed


def first_alarm(page: DecisionPage) -> float:
    """The number of decisions after which the guardrail breaks; infinite if it never does."""
    found = (place for place, broken in enumerate(alarms(page), start=1) if broken)
    return next(found, float("inf")) * CHECKED_EVERY


@cache
def fewest_slow(answers: int) -> int:
    """The number of slow answers from which the guardrail on answer times breaks."""
    if answers < FEWEST_ANSWERS:
        return answers + 1
    low, high = 0, answers
    while low < high:
        middle = (low + high) // 2
        broken = binomial_tail(middle, answers, SLOW_SHARE) < GUARDRAIL_LEVEL
        low, high = (low, middle) if broken else (middle + 1, high)
    return low


def slow_alarms(random: np.random.Generator, an_hour: float, slow_share: float, days: int, newest: int) -> bool:
    """Whether the guardrail on answer times breaks during a roll-out. The challenger gives `an_hour` answers, and each
    is slow with the probability `slow_share`. Every 20 seconds the answers of a day are counted, at most `newest`."""
    steps, window = days * 4_320, min(4_320, int(newest / an_hour * 180))
    answers = random.poisson(an_hour / 180, steps)
    counted = [np.pad(item, (window, 0)).cumsum() for item in (answers, random.binomial(answers, slow_share))]
    n, slow = (total[window:] - total[:-window] for total in counted)
    different, places = np.unique(n, return_inverse=True)
    return bool((slow >= np.array([fewest_slow(int(item)) for item in different])[places]).any())


def slow_machine_alarms(random: np.random.Generator, windows: int, answers: int, tail: float) -> int:
    """The number of windows in which the guardrail breaks although both policies are equally slow, far beyond the
    limit. The times are Pareto-distributed with the exponent `tail`."""
    found = 0
    for _ in range(windows):
        allowed = SLOWER * np.quantile(random.pareto(tail, 3 * answers), 0.99)
        found += int((random.pareto(tail, answers) > allowed).sum()) >= fewest_slow(answers)
    return found


def users_roll_out(
    random: np.random.Generator, users: int, decisions: int, share: float, lift: float
) -> tuple[float, bool]:
    """The number of decisions after which the guardrail on the rewards of the challenger's users breaks, infinite if it
    never does; and whether the numbers of users ever seem to contradict the share."""
    user = random.integers(0, users, decisions)
    level, served = random.beta(2, 5, users), random.random(users) < share
    arm = served[user].astype(float)
    rewards = (random.random(decisions) < np.clip(level[user] + lift * arm, 0, 1)).astype(float)
    names = np.array([f"user-{number}" for number in range(users)])[user].tolist()
    one, zero = np.ones(decisions), np.zeros(decisions)
    page = DecisionPage(names, rewards, one, one, one, zero, zero, zero, zero, zero, zero, zero)
    alarm, mismatch = float("inf"), False
    for end in range(CHECKED_EVERY, decisions + 1, CHECKED_EVERY):
        start = max(0, end - NEWEST)
        found = Experiment.of(page_slice(page, start, end), arm[start:end], share)
        mismatch |= found.p < MISMATCH
        if found.lift is not None and found.lift.high < -SETTINGS.rollout_margin:
            alarm = min(alarm, end)
    return alarm, mismatch


def print_coverage(random: np.random.Generator, runs: int) -> None:
    print("looks at 4,000 decisions whose interval of the lift misses, by its level")
    for users in (100, 400, 2_000):
        for exponent in (0.0, 0.8, 1.2):
            found = missed(random, runs, users, exponent, (0.1, look_level(1)))
            effective = 1 / float((zipf(users, exponent) ** 2).sum())
            print(f"    {users:5} users, Zipf {exponent}: effective {effective:6.1f}: {found[0]:6.1%} {found[1]:6.1%}")


def print_dismissals(random: np.random.Generator, runs: int) -> None:
    print("guardrail on dismissals: roll-outs of 60,000 decisions of 5,000 users in which it breaks")
    for more in (0.03, 0.04, 0.05, 0.06, 0.08):
        for share in (0.0, 0.25):
            found = np.array([first_alarm(dismissing(random, DECISIONS, USERS, more, share)) for _ in range(runs)])
            ended = [f"{(found <= n).mean():5.0%} by {n:,}" for n in (4_000, 10_000, 20_000, DECISIONS)]
            print(f"    {more:+.0%} at {share:3.0%}: {', '.join(ended)}", flush=True)


def print_answers(random: np.random.Generator, runs: int) -> None:
    print("guardrail on answer times: roll-outs of 30 days in which it breaks, if 1 % of the answers are slow")
    for an_hour, newest in ((100, 2_000), (1_000, 2_000), (5_000, 10_000), (20_000, 40_000)):
        found = sum(slow_alarms(random, an_hour, SLOW_SHARE, 30, newest) for _ in range(10 * runs))
        print(f"    {an_hour:6,} answers an hour, {newest:6,} counted: {found} of {10 * runs}", flush=True)
    for tail in (1.0, 2.0, 4.0):
        print(f"    equally slow, Pareto {tail}: {slow_machine_alarms(random, 10 * runs, 1_000, tail)} of {10 * runs}")
    print(
        "share of slow answers from which it breaks:", {n: f"{fewest_slow(n) / n:.2%}" for n in (1_000, 2_000, 40_000)}
    )


def print_users(random: np.random.Generator, runs: int) -> None:
    print("the users of each policy: roll-outs of 60,000 decisions of 5,000 users in which the guardrail breaks")
    for share in (0.05, 0.25):
        for lift in (-0.02, -0.05, -0.1):
            found = [users_roll_out(random, USERS, DECISIONS, share, lift) for _ in range(runs)]
            broken = np.array([alarm for alarm, _ in found])
            ended = [f"{(broken <= n).mean():5.0%} by {n:,}" for n in (20_000, DECISIONS)]
            mismatches = sum(mismatch for _, mismatch in found)
            print(
                f"    {lift:+.2f} at {share:3.0%}: {', '.join(ended)}; wrong share: {mismatches} of {runs}", flush=True
            )


PARTS: dict[str, Callable[[np.random.Generator, int], None]] = {
    "coverage": print_coverage,
    "dismissals": print_dismissals,
    "answers": print_answers,
    "users": print_users,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    arguments.add_argument("--runs", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=1)
    asked = arguments.parse_args()
    for part in asked.parts:
        PARTS[part](np.random.default_rng(asked.seed), asked.runs)


if __name__ == "__main__":
    main()
