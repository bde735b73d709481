"""Estimates, from the decision log, the reward of a policy that may never have run, and draws a picture of them.

The estimators and their intervals are those of the roll-out (`app.bandit.rollout.aggregates`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from app.bandit.evaluation.replay import PriorMean, Replay
from app.bandit.model.definitions import NEW_PRECISION, ONE
from app.bandit.model.inputs import CANDIDATE_FACTORS, EVALUATED, SHARED_FACTORS, Array, Input
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, POOLED_CHAMPION, SCALE, Policy, best
from app.bandit.numpy_on_demand import np
from app.bandit.ports import LoggedDecision, UserLog
from app.bandit.rollout.aggregates import DecisionPage, DecisionSums, Estimates
from app.bandit.rollout.bootstrap_intervals import Interval
from app.errors import Conflict, InvalidInput, Issue
from app.features.events import Action

LEVEL = 0.05
BINS = 10
POLICIES = {policy.id: policy for policy in (CHAMPION, CHALLENGER, POOLED_CHAMPION)}


class EvaluatedInput(Input, frozen=True, forbid_unknown_fields=True):
    """An input of a policy that is described in a file."""

    precision: Annotated[float, Meta(ge=1e-12, le=1e12)] = NEW_PRECISION

    def __post_init__(self) -> None:
        _check("candidate", self.candidate, CANDIDATE_FACTORS)
        _check("shared", self.shared, [factor for factor in SHARED_FACTORS if factor != EVALUATED])


MAX_V = 1_000  # already about one choice at random; sums of squares stay finite


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy that is described in a TOML file: that with the name `base`, and changes to it."""

    id: str
    base: str
    v: Annotated[float, Meta(gt=0, le=MAX_V)] = SCALE
    inputs: tuple[EvaluatedInput, ...] = ()

    def __post_init__(self) -> None:
        _check("base", self.base, POLICIES)


def _check(field: str, name: str, known: Collection[str]) -> None:
    """Raise `ValueError`, which msgspec turns into an error with the place, if the name is not known."""
    if name not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}, not {name!r}")


def policy_of(source: str) -> Policy:
    """A policy by its name, or from a TOML file. Raises `InvalidInput`, which names the field and what is allowed."""
    if (known := POLICIES.get(source)) is not None:
        return known
    try:
        file = msgspec.convert(tomllib.loads(Path(source).read_text()), PolicyFile)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        detail = f"{source} is not one of {', '.join(POLICIES)}, and not a file with a policy: {error}"
        raise InvalidInput("the policy cannot be read", [Issue("--policy", detail)]) from error
    return extended(msgspec.structs.replace(POLICIES[file.base], scale=file.v), file.id, file.inputs)


def extended(policy: Policy, name: str, inputs: Sequence[Input]) -> Policy:
    """The policy with another name and more inputs."""
    spec = msgspec.structs.replace(policy.spec, inputs=(*policy.spec.inputs, *inputs))
    return msgspec.structs.replace(policy, id=name, spec=spec)


def with_feature(policy: Policy, name: str) -> Policy:
    """The policy with three more inputs: the feature under evaluation times each factor of a candidate.

    Raises:
        InvalidInput: the policy has no pooled prior, from which it would learn the effect of the feature.
    """
    if not policy.spec.pooled:
        detail = f"{policy.id} has no pooled prior, which learns the effect of a feature; evaluate lints-v1+pool"
        raise InvalidInput("a feature cannot be evaluated", [Issue("--policy", detail)])
    factors = [factor for factor in CANDIDATE_FACTORS if factor != ONE]
    inputs = [Input(f"{name}_x_{factor}", factor, EVALUATED, NEW_PRECISION) for factor in factors]
    return extended(policy, f"{policy.id}+{name}", inputs)


def ranked(values: Mapping[int, float]) -> dict[int, float]:
    """Each value as its rank among all, from -1 (the lowest) to 1; equal values have the same rank. A rank is bounded
    and does not depend on the unit of the feature."""
    numbers = np.sort(np.array([*values.values()]))
    low, high = (np.searchsorted(numbers, [*values.values()], side=side) for side in ("left", "right"))
    return dict(zip(values, ((low + high) / max(1, len(numbers)) - 1).tolist(), strict=True))


class Evaluation:
    """Evaluates a replayed policy against another one or, if that is None, against the policies that served."""

    def __init__(
        self,
        policy: tuple[Replay, PriorMean],
        baseline: tuple[Replay, PriorMean] | None,
        predicted: Callable[[LoggedDecision], Array],
        counts: Callable[[LoggedDecision], bool],
    ) -> None:
        """`predicted` is the reward model. `counts` tells whether to evaluate a decision; all are learned from."""
        self._policy, self._baseline = policy, baseline
        self._predicted, self._counts = predicted, counts
        self._sums, self._bins = DecisionSums(), np.zeros((BINS, 3))

    def add(self, log: UserLog) -> None:
        replay, prior = self._policy
        rankings = list(replay.rankings(log, prior, self._counts))
        if not rankings:
            return
        others = [item.decision.ranking for item, _ in rankings]
        if self._baseline is not None:
            replay, prior = self._baseline
            others = [ranking for _, ranking in replay.rankings(log, prior, self._counts)]
        rows = []
        for (item, ranking), other in zip(rankings, others, strict=True):
            made, q = item.decision, self._predicted(item)
            reward, score = item.outcome.reward or 0.0, float(ranking.scores[made.chosen])
            self._bins[int(np.clip(score * BINS, 0, BINS - 1))] += 1, score, reward
            pis = [each.pi[made.chosen] for each in (made.ranking, other, ranking)]
            dismissed, agreed = item.outcome.action == Action.DISMISSED, best(ranking.scores) == best(other.scores)
            values = (q[made.chosen], other.pi @ q, ranking.pi @ q)
            rows.append((reward, *pis, *values, dismissed, agreed, np.nan, np.nan))
        self._sums.add(DecisionPage([log.user_id] * len(rows), *np.array(rows, np.float64).T))

    def estimates(self) -> Estimates:
        """Raises `Conflict` if the log is not sufficient."""
        if not self._sums.n:
            raise Conflict(
                "no decision of the period can be evaluated: one counts if it explored, its reward is learned, and "
                "no older one still waits for its reward"
            )
        try:
            return self._sums.estimates(LEVEL, np.random.default_rng(1))
        except ValueError as error:
            raise Conflict(f"{self._sums.n} decisions of {self._sums.users} users do not suffice: {error}") from error

    def calibration(self) -> list[list[float]]:
        """By tenth of the score (the reward that the policy expects of the chosen candidate), without empty ones: the
        number of decisions, their mean score, and their mean reward."""
        known = self._bins[self._bins[:, 0] > 0]
        return [[n, score / n, reward / n] for n, score, reward in known.tolist()]


def picture(title: str, intervals: Mapping[str, Interval], bins: Sequence[Sequence[float]]) -> str:
    """An SVG picture: the intervals on the left; on the right, mean reward by mean score, as dots of an area that is
    proportional to the number of decisions."""
    low, high = min(item.low for item in intervals.values()), max(item.high for item in intervals.values())
    most, drawn = max(n for n, _, _ in bins), []
    for y, (name, item) in zip(range(70, 300, 45), intervals.items(), strict=False):
        value, left, right = (130 + 250 * (number - low) / ((high - low) or 1) for number in item)
        drawn += [
            f'<text x="10" y="{y + 4}">{name}</text>',
            f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="#1f6feb" stroke-width="2"/>',
            f'<circle cx="{value:.1f}" cy="{y}" r="4" fill="#1f6feb"/>',
            f'<text x="390" y="{y + 4}">{item.value:.4f} ({item.low:.4f} to {item.high:.4f})</text>',
        ]
    for n, score, reward in bins:
        x, height, radius = 620 + 200 * min(1, max(0, score)), 250 - 200 * reward, 10 * (n / most) ** 0.5
        text = f"{n:.0f} decisions: score {score:.3f}, reward {reward:.3f}"
        circle = f'<circle cx="{x:.1f}" cy="{height:.1f}" r="{radius:.1f}" fill="#1f6feb" fill-opacity="0.6">'
        drawn.append(f"{circle}<title>{text}</title></circle>")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 290" font-family="sans-serif" font-size="12">
<rect width="840" height="290" fill="#fff"/>
<text x="10" y="25" font-size="15">{escape(title)}: reward per decision</text>
<rect x="620" y="50" width="200" height="200" fill="none" stroke="#888"/>
<path d="M620 250L820 50" stroke="#888" stroke-dasharray="4"/>
<text x="620" y="40">Mean reward (up) by score (right), 0 to 1</text>
{"".join(drawn)}
</svg>
"""
