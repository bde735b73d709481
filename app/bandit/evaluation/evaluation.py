"""Estimates, from the decision log, the reward of a policy that may never have run, and draws a picture of them.

The estimators and their intervals are those of the roll-out (`app.bandit.rollout.aggregates`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from app.bandit.evaluation.replay import Priors, Replay
from app.bandit.model.inputs import CANDIDATE_FACTORS, EVALUATED, SHARED_FACTORS, Array
from app.bandit.model.specs import NEW_PRECISION, Input, Spec
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


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy that is described in a TOML file: the inputs of the policy `base`, and further `inputs`."""

    id: str
    base: str | None = None
    v: float = SCALE
    pooled: bool | None = None
    inputs: tuple[Input, ...] = ()


def policy_of(source: str) -> Policy:
    """A policy by its name, or from a TOML file. Raises `InvalidInput`, which names the field and what is allowed."""
    if not source.endswith(".toml"):
        return _named(source, "--policy", "or a file *.toml")
    try:
        file = msgspec.convert(tomllib.loads(Path(source).read_text()), PolicyFile)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput(f"the policy in {source} cannot be read", [Issue(source, str(error))]) from error
    base = None if file.base is None else _named(file.base, "base")
    inputs = (*(base.spec.inputs if base is not None else ()), *file.inputs)
    pooled = file.pooled if file.pooled is not None else base is not None and base.spec.pooled
    names = [entry.name for entry in inputs]
    rules = (
        (bool(inputs), "inputs", "are empty; name a base, or list inputs"),
        (0 < file.v < float("inf"), "v", f"is {file.v}; it must be positive"),
        (len({*names}) == len(names), "inputs", "a name occurs twice"),
        *(
            (entry.candidate in CANDIDATE_FACTORS, f"{entry.name}.candidate", _allowed(CANDIDATE_FACTORS))
            for entry in inputs
        ),
        *((entry.shared in SHARED_FACTORS, f"{entry.name}.shared", _allowed(SHARED_FACTORS)) for entry in inputs),
        *((0 < entry.precision < float("inf"), f"{entry.name}.precision", "must be positive") for entry in inputs),
    )
    if issues := [Issue(place, problem) for kept, place, problem in rules if not kept]:
        raise InvalidInput(f"the policy in {source} is invalid", issues)
    return Policy(file.id, Spec(file.id, 0, inputs, pooled), file.v)


def with_feature(policy: Policy, name: str) -> Policy:
    """The policy with three more inputs: the feature under evaluation times each factor of a candidate."""
    more = [
        Input(f"{name}_x_{factor}", factor, EVALUATED, NEW_PRECISION) for factor in CANDIDATE_FACTORS if factor != "one"
    ]
    spec = msgspec.structs.replace(policy.spec, inputs=(*policy.spec.inputs, *more), pooled=True)
    return msgspec.structs.replace(policy, id=f"{policy.id}+{name}", spec=spec)


def ranked(values: Mapping[int, float]) -> dict[int, float]:
    """Each value as its rank among all, from -1 (the lowest) to 1; equal values have the same rank. A rank is bounded
    and does not depend on the unit of the feature."""
    numbers = np.sort(np.array([*values.values()]))
    low, high = (np.searchsorted(numbers, [*values.values()], side=side) for side in ("left", "right"))
    return dict(zip(values, ((low + high) / max(1, len(numbers)) - 1).tolist(), strict=True))


class CalibrationBin(msgspec.Struct):
    """The decisions whose score, the reward that the policy expects of the chosen candidate, lies in a tenth of [0, 1],
    with their mean score and their mean reward."""

    decisions: int
    score: float
    reward: float


class Evaluation:
    """Evaluates a replayed policy against another one or, if that is None, against the policies that served."""

    def __init__(
        self,
        policy: tuple[Replay, Priors],
        baseline: tuple[Replay, Priors] | None,
        predicted: Callable[[LoggedDecision], Array],
        counts: Callable[[LoggedDecision], bool],
    ) -> None:
        """`predicted` is the reward model. `counts` tells whether to evaluate a decision; all are learned from."""
        self._policy, self._baseline = policy, baseline
        self._predicted, self._counts = predicted, counts
        self._sums, self._bins = DecisionSums(), np.zeros((BINS, 3))

    def add(self, log: UserLog) -> None:
        replay, priors = self._policy
        rankings = [pair for pair in replay.rankings(log, priors) if self._counts(pair[0])]
        if not rankings:
            return
        others = [item.decision.ranking for item, _ in rankings]
        if self._baseline is not None:
            replay, priors = self._baseline
            others = [ranking for item, ranking in replay.rankings(log, priors) if self._counts(item)]
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
        try:
            return self._sums.estimates(LEVEL, np.random.default_rng(1))
        except ValueError as error:
            raise Conflict(
                f"{self._sums.n} decisions of {self._sums.users} users cannot be evaluated: {error}"
            ) from error

    def calibration(self) -> list[CalibrationBin | None]:
        """By tenth of the score; None for a tenth without decisions."""
        return [
            CalibrationBin(int(n), score / n, reward / n) if n else None for n, score, reward in self._bins.tolist()
        ]


def picture(title: str, intervals: Mapping[str, Interval], bins: Iterable[CalibrationBin | None]) -> str:
    """An SVG picture: the intervals on the left; on the right, mean reward by mean score, as dots of an area that is
    proportional to the number of decisions."""
    low, high = min(item.low for item in intervals.values()), max(item.high for item in intervals.values())
    span = (high - low) or 1.0
    drawn = []
    for place, (name, item) in enumerate(intervals.items()):
        y, (value, left, right) = 70 + 45 * place, (130 + 250 * (number - low) / span for number in item)
        drawn += [
            f'<text x="10" y="{y + 4}">{name}</text>',
            f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="#1f6feb" stroke-width="2"/>',
            f'<circle cx="{value:.1f}" cy="{y}" r="4" fill="#1f6feb"/>',
            f'<text x="390" y="{y + 4}">{item.value:.4f} ({item.low:.4f} to {item.high:.4f})</text>',
        ]
    known = [item for item in bins if item is not None]
    most = max((item.decisions for item in known), default=1)
    for dot in known:
        across, up = 620 + 200 * min(1.0, max(0.0, dot.score)), 250 - 200 * dot.reward
        drawn.append(
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{2 + 8 * (dot.decisions / most) ** 0.5:.1f}" fill="#1f6feb" '
            f'fill-opacity="0.6"><title>{dot.decisions} decisions: score {dot.score:.3f}, reward '
            f"{dot.reward:.3f}</title></circle>"
        )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 290" font-family="sans-serif" font-size="12">
<rect width="840" height="290" fill="#fff"/>
<text x="10" y="25" font-size="15">{title.replace("&", "&amp;").replace("<", "&lt;")}: reward per decision</text>
<rect x="620" y="50" width="200" height="200" fill="none" stroke="#888"/>
<path d="M620 250L820 50" stroke="#888" stroke-dasharray="4"/>
<text x="620" y="40">Mean reward (up) by score (right), 0 to 1</text>
{chr(10).join(drawn)}
</svg>
"""


def _named(name: str, place: str, alternative: str = "") -> Policy:
    if name not in POLICIES:
        raise InvalidInput(
            "there is no such policy", [Issue(place, f"{name!r} is not {_allowed(POLICIES)} {alternative}")]
        )
    return POLICIES[name]


def _allowed(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"
