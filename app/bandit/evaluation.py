"""Estimates, from the decision log, the reward of a policy that may never have run, and draws them as a picture.

Each decision is made again from its request, its profile, and the user's statistics at the time of the decision: the
sums over the user's first `state_version` learned decisions. The input vectors of those decisions are computed again
with the inputs of the policy. So a new input takes effect from the first logged decision on. The estimators and their
intervals are those of the roll-out (`app.bandit.rollout.aggregates`).

Invariant: the reward of a decision affects neither this decision nor an earlier one.
"""

from __future__ import annotations

import itertools
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from app.bandit.decisions import Decision
from app.bandit.model.definitions import NEW_PRECISION, ONE
from app.bandit.model.inputs import CANDIDATE_FACTORS, EVALUATED, SHARED_FACTORS, Array, Input
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics, pooled_mean, sound
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, POOLED_CHAMPION, SCALE, Policy, Ranking, best
from app.bandit.numpy_on_demand import np
from app.bandit.ports import LoggedDecision, UserLog
from app.bandit.rollout.aggregates import DecisionPage, DecisionSums, Estimates
from app.bandit.rollout.bootstrap_intervals import Interval
from app.errors import Conflict, InvalidInput, Issue, SpecMismatch
from app.features.events import Action

Counts = Callable[[LoggedDecision], bool]  # whether to evaluate a decision; all are learned from
MOST_PRIORS = 256  # that are pooled from the log
LEVEL = 0.05
BINS = 10
MAX_V = 1_000  # already about one choice at random; sums of squares stay finite
POLICIES = {policy.id: policy for policy in (CHAMPION, CHALLENGER, POOLED_CHAMPION)}


class EvaluatedInput(Input, frozen=True, forbid_unknown_fields=True):
    precision: Annotated[float, Meta(ge=1e-12, le=1e12)] = NEW_PRECISION

    def __post_init__(self) -> None:
        _check("candidate", self.candidate, CANDIDATE_FACTORS)
        _check("shared", self.shared, [factor for factor in SHARED_FACTORS if factor != EVALUATED])


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of a TOML file with a policy: changes to the policy named `base`."""

    id: str
    base: str
    v: Annotated[float, Meta(gt=0, le=MAX_V)] = SCALE
    inputs: tuple[EvaluatedInput, ...] = ()

    def __post_init__(self) -> None:
        _check("base", self.base, POLICIES)


def _check(field: str, name: str, known: Collection[str]) -> None:
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
    spec = msgspec.structs.replace(policy.spec, inputs=(*policy.spec.inputs, *inputs))
    return msgspec.structs.replace(policy, id=name, spec=spec)


def with_feature(policy: Policy, name: str) -> Policy:
    """The policy with three more inputs: the feature under evaluation times each factor of a candidate. Raises
    `InvalidInput` if the policy has no pooled prior, which learns the effect of the feature."""
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


class Replay(msgspec.Struct, frozen=True):
    """A policy to replay. If `profiles` is false, every decision is replayed without a profile. `values` maps the
    number of a decision to the value, within [-1, 1], of the feature under evaluation. `priors` contains the version
    and the mean of each pooled prior, oldest first."""

    policy: Policy
    profiles: bool = True
    values: Mapping[int, float] = {}
    priors: Sequence[tuple[int, Array]] = ()

    def recorded(self, priors: Sequence[Prior]) -> Replay | None:
        """The replay with the recorded priors. None if a recorded prior lacks an input of the policy, or if the replay
        ignores profiles, since the recorded priors were made with profiles. Priors are then pooled from the log."""
        spec = self.policy.spec
        if not spec.pooled:
            return self  # it reads no prior
        if not self.profiles or not all(spec.prefix_of(prior.spec) for prior in priors):
            return None
        return msgspec.structs.replace(self, priors=[(prior.version, prior.mu) for prior in priors])

    def mean(self, version: int) -> Array:
        """The mean of the newest prior whose version is at most `version`; zeros if there is no such prior."""
        place = bisect_right(self.priors, version, key=itemgetter(0))
        return self.priors[place - 1][1] if place else np.zeros(self.policy.spec.size)

    def phi(self, item: LoggedDecision) -> Array:
        made = item.decision
        profile = made.profile if self.profiles else None
        return self.policy.spec.phi(made.candidates, made.context, profile, self.values.get(item.number, 0.0))

    def rankings(self, log: UserLog, counts: Counts) -> Iterator[tuple[LoggedDecision, Ranking]]:
        """For each decision of the user that `counts` selects, the ranking that the policy would have answered."""
        counted = [item for item in log.decisions if counts(item)]
        if damaged(log) or not counted:
            return
        learned = in_order_of_learning(log)
        phis = {item.number: self.phi(item) for item in counted}
        statistics, at = self.before(log, learned), 0
        for item in sorted(counted, key=lambda each: (each.decision.state_version, each.number)):
            while at < len(learned) and statistics.decisions < item.decision.state_version:
                statistics = self.after(statistics, learned[at], phis.get(learned[at].number))
                at += 1
            made, mu = item.decision, self.mean(item.decision.prior_version)
            ranking, _ = self.policy.decide(made.id, statistics, mu, phis[item.number], made.explore)
            yield item, ranking

    def before(self, log: UserLog, learned: Sequence[LoggedDecision]) -> SufficientStatistics:
        """The statistics of the decisions that have been pruned from the log: the stored statistics minus the logged
        decisions. First, the logged decisions are subtracted with all inputs of the stored spec. An earlier release
        padded statistics with zeros, so the difference may be one that no decisions can have. Then only the inputs that
        every logged vector has are subtracted. If that difference is not possible either, for example after a restore,
        the sums are zeros."""
        spec, stored = self.policy.spec, log.statistics
        if stored is None or stored.decisions <= len(learned):
            return SufficientStatistics.none(spec)
        own = stored.spec
        shared = min((len(item.decision.phi) for item in learned), default=own.size)
        for known in (own, msgspec.structs.replace(own, inputs=own.inputs[:shared])):
            logged = SufficientStatistics.none(known)
            with suppress(SpecMismatch):  # a logged vector is damaged
                for item in learned:
                    vector = item.decision.vector(known)[: known.size]
                    logged = logged.learned(vector, item.outcome.reward or 0.0)
                numbers = stored.of_common_inputs(known).numbers - logged.numbers
                rest = SufficientStatistics(known, numbers, stored.decisions - logged.decisions)
                if sound(known, rest.pack(), rest.decisions):
                    return rest.of_common_inputs(spec)
        return msgspec.structs.replace(SufficientStatistics.none(spec), decisions=stored.decisions - len(learned))

    def after(
        self, statistics: SufficientStatistics, item: LoggedDecision, phi: Array | None = None
    ) -> SufficientStatistics:
        """The statistics after the decision is learned. `phi` (K, D) are its input vectors; None to compute them."""
        phi = self.phi(item) if phi is None else phi
        return statistics.learned(phi[item.decision.chosen], item.outcome.reward or 0.0)


class PriorsFromLog:
    """Estimates pooled priors for a replayed policy from users' logs: for each stored prior, the prior that the policy
    would have had when the stored one was made."""

    def __init__(self, replay: Replay, priors: Sequence[Prior]) -> None:
        self._replay = replay
        self._priors = priors[:: len(priors) // MOST_PRIORS + 1]
        self._times = [prior.created_at_ms for prior in self._priors]
        none = SufficientStatistics.none(replay.policy.spec)
        self._sums = [none.numbers.copy() for _ in range(len(self._priors) + 1)]  # by the first prior that has them

    def add(self, log: UserLog) -> None:
        learned = in_order_of_learning(log)
        statistics = self._replay.before(log, learned)
        self._sums[0] += statistics.numbers
        for item in learned:
            more = self._replay.after(statistics, item)
            place = bisect_right(self._times, item.outcome.settled_at_ms or 0)
            self._sums[place] += more.numbers - statistics.numbers
            statistics = more

    def pooled(self) -> Replay:
        spec, totals = self._replay.policy.spec, itertools.accumulate(self._sums[:-1])
        means = (pooled_mean(SufficientStatistics(spec, numbers, 0)) for numbers in totals)
        versions = (prior.version for prior in self._priors)
        return msgspec.structs.replace(self._replay, priors=list(zip(versions, means, strict=True)))


def damaged(log: UserLog) -> bool:
    """Whether a user has learned decisions but no readable statistics. Such a user cannot be replayed, because only the
    statistics tell how many decisions have been pruned."""
    return log.statistics is None and any(item.outcome.state == "learned" for item in log.decisions)


def in_order_of_learning(log: UserLog) -> list[LoggedDecision]:
    """The learned decisions of a user, first learned first."""
    learned = [item for item in log.decisions if item.outcome.state == "learned"]
    return sorted(learned, key=lambda item: (item.outcome.settled_at_ms, item.number))


class Evaluation:
    """Compares a replayed policy with a second replayed policy or, if none is given, with the policies that served."""

    def __init__(self, replays: Sequence[Replay], priors: Sequence[Prior], counts: Counts) -> None:
        """`replays` contains the policy and, optionally, the second policy. `priors` are the recorded priors."""
        self._replays, self._counts = replays, counts
        self._priors = {prior.version: prior for prior in priors}
        self._sums, self._bins = DecisionSums(), np.zeros((BINS, 3))

    def add(self, log: UserLog) -> None:
        rankings, *others = ([*replay.rankings(log, self._counts)] for replay in self._replays)
        if not rankings:
            return
        baseline = others[0] if others else [(item, item.decision.ranking) for item, _ in rankings]
        rows = []
        for (item, ranking), (_, other) in zip(rankings, baseline, strict=True):
            made, q = item.decision, self._predicted(item.decision)
            reward, score = item.outcome.reward or 0.0, float(ranking.scores[made.chosen])
            self._bins[int(np.clip(score * BINS, 0, BINS - 1))] += 1, score, reward
            pis = [each.pi[made.chosen] for each in (made.ranking, other, ranking)]
            dismissed, agreed = item.outcome.action == Action.DISMISSED, best(ranking.scores) == best(other.scores)
            values = (q[made.chosen], other.pi @ q, ranking.pi @ q)
            rows.append((reward, *pis, *values, dismissed, agreed, np.nan, np.nan))
        self._sums.add(DecisionPage([log.user_id] * len(rows), *np.array(rows, np.float64).T))

    def _predicted(self, made: Decision) -> Array:
        """The reward q (K,) that a model predicts for each candidate, for the doubly robust estimates. The model is the
        decision's recorded prior, which was fitted to earlier rewards."""
        prior = self._priors.get(made.prior_version)
        if prior is None:
            return np.zeros(len(made.candidates))
        return np.clip(made.phi_under(prior.spec) @ prior.mu, 0.0, 1.0)

    def estimates(self) -> Estimates:
        """The estimates from all added logs. Raises `Conflict` if these contain too few decisions."""
        if not self._sums.n:
            raise Conflict(
                "no decision of the period can be evaluated: it must be made with exploration, its reward must be "
                "learned, and no older decision may still wait for its reward"
            )
        try:
            return self._sums.estimates(LEVEL, np.random.default_rng(1))
        except ValueError as error:
            raise Conflict(f"{self._sums.n} decisions of {self._sums.users} users do not suffice: {error}") from error

    def calibration(self) -> list[list[float]]:
        """For each tenth of [0, 1], the decisions whose chosen candidate has a score in it: their number, their mean
        score and their mean reward. Tenths without decisions are left out."""
        known = self._bins[self._bins[:, 0] > 0]
        return [[n, score / n, reward / n] for n, score, reward in known.tolist()]


def picture(title: str, intervals: Mapping[str, Interval], bins: Sequence[Sequence[float]]) -> str:
    """An SVG picture. On the left are the intervals. On the right is a dot for each of `bins`, placed by its mean score
    and its mean reward, with an area that is proportional to its number of decisions."""
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
