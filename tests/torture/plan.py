"""The plan of a run, drawn from its seed: which fault begins when. The clients' operations are drawn from it, too."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

# Now and then nothing happens for a while, so that the cache is well and takes part.
QUIET_EVERY_S = 12.0
QUIET_S = 3.0


class Step(NamedTuple):
    """A fault, when it begins, and the seed of what it draws itself."""

    at_s: float
    fault: str
    seed: int


def draw_plan(seed: int, seconds: float, faults: Sequence[str], rate_per_s: float) -> list[Step]:
    """Every fault as often as every other, in an order by the seed, at moments by the seed."""
    random = Random(f"plan/{seed}")
    steps: list[Step] = []
    deck: list[str] = []
    now_s = 1.0
    while True:
        now_s += random.expovariate(rate_per_s)
        if now_s % QUIET_EVERY_S > QUIET_EVERY_S - QUIET_S:
            now_s += QUIET_S
        if now_s >= seconds:
            return steps
        if not deck:
            deck = list(faults)
            random.shuffle(deck)
        steps.append(Step(now_s, deck.pop(), random.getrandbits(32)))


def told(steps: Sequence[Step]) -> str:
    """A line for each."""
    return "\n".join(f"{step.at_s:9.3f} s  {step.fault}  ({step.seed})" for step in steps)
