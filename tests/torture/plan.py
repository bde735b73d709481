"""The plan of a run, drawn from its seed: which fault begins when."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

# The end of each period has no faults, so that the cache is available and takes part.
QUIET_EVERY_S = 12.0
QUIET_S = 3.0


class Step(NamedTuple):
    """A fault, when it begins, and the seed of its own random choices."""

    at_s: float
    fault: str
    seed: int


def draw_plan(seed: int, seconds: float, faults: Sequence[str], rate_per_s: float) -> list[Step]:
    """Draw faults at random moments. All occur equally often: a fault is repeated only after each of the others."""
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


def listing(steps: Sequence[Step]) -> str:
    return "\n".join(f"{step.at_s:9.3f} s  {step.fault}  ({step.seed})" for step in steps)
