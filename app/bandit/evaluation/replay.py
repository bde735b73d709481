"""Replays the decision log under a policy that may never have run.

Each decision is made again from what was known when it was made: its request, its profile, and the user's statistics,
which are the sum over the first `state_version` decisions that were learned from the user. The vectors of these are
computed again with the inputs of the policy, so a new input has its effect from the first logged decision on.

- Decisions that the retention has pruned are in the user's stored statistics only. What these have beyond the logged
  decisions is the beginning, for the inputs that the policy has in common with them; other inputs begin with zeros.
- The pooled priors are the recorded ones if all of them have the policy's inputs. Otherwise priors are pooled from the
  log, at moments at which priors were stored, from what had been learned before.

Invariant: no reward has an effect on its own decision or on an earlier one.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import msgspec

from app.bandit.decisions import Ranking
from app.bandit.model.inputs import Array, candidate_factors, shared_factors
from app.bandit.model.sufficient_statistics import Prior, SufficientStatistics, pooled_mean, sound
from app.bandit.model.thompson_sampling import Policy
from app.bandit.numpy_on_demand import np
from app.bandit.ports import LoggedDecision, UserLog
from app.errors import SpecMismatch

PriorMean = Callable[[int], Array]
MOST_PRIORS = 256  # that are pooled from the log


class Replay(msgspec.Struct, frozen=True):
    """A policy to replay. Without `profiles`, every profile counts as absent. `values` has the values of the feature
    under evaluation, within [-1, 1], by the sequence number of the decision."""

    policy: Policy
    profiles: bool = True
    values: Mapping[int, float] = {}

    def phi(self, item: LoggedDecision) -> Array:
        made = item.decision
        profile = made.profile if self.profiles else None
        shared = shared_factors(made.context, profile, self.values.get(item.number, 0.0))
        return self.policy.spec.phi_from(candidate_factors(made.candidates), shared)

    def rankings(
        self, log: UserLog, prior: PriorMean, counts: Callable[[LoggedDecision], bool]
    ) -> Iterator[tuple[LoggedDecision, Ranking]]:
        """The ranking that the policy would have answered in each of a user's decisions that count."""
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
            made, mu = item.decision, prior(item.decision.prior_version)
            ranking, _ = self.policy.decide(made.id, statistics, mu, phis[item.number], made.explore)
            yield item, ranking

    def before(self, log: UserLog, learned: Sequence[LoggedDecision]) -> SufficientStatistics:
        """The statistics of the decisions that are no longer in the log: the stored ones without the logged decisions.

        The stored statistics have learned each logged decision with all inputs of their spec. If they have not, because
        an earlier release padded them with zeros, the inputs that each decision was logged with are used, and zeros for
        the others. If the log contradicts the statistics even so, as after a restore, all are zeros.
        """
        spec, stored = self.policy.spec, log.statistics
        if stored is None or stored.decisions <= len(learned):
            return SufficientStatistics.none(spec)
        own = stored.spec
        shared = min((len(item.decision.phi) for item in learned), default=own.size)
        for known in (own, msgspec.structs.replace(own, inputs=own.inputs[:shared])):
            logged = SufficientStatistics.none(known)
            with suppress(SpecMismatch):  # a logged vector is damaged
                for item in learned:
                    logged = logged.learned(item.decision.vector(known)[: known.size], _reward(item))
                numbers = stored.of_common_inputs(known).numbers - logged.numbers
                rest = SufficientStatistics(known, numbers, stored.decisions - logged.decisions)
                if sound(known, rest.pack(), rest.decisions):
                    return rest.of_common_inputs(spec)
        return msgspec.structs.replace(SufficientStatistics.none(spec), decisions=stored.decisions - len(learned))

    def after(
        self, statistics: SufficientStatistics, item: LoggedDecision, phi: Array | None = None
    ) -> SufficientStatistics:
        """The statistics after the decision. `phi`: its input vectors, if they are known."""
        phi = self.phi(item) if phi is None else phi
        return statistics.learned(phi[item.decision.chosen], _reward(item))


def prior_means(versions: Sequence[int], means: Sequence[Array], size: int) -> PriorMean:
    """By the version that a decision was made with: the mean of the newest prior up to it; zeros if there is none."""
    none = np.zeros(size)

    def mean(version: int) -> Array:
        place = bisect_right(versions, version)
        return means[place - 1] if place else none

    return mean


def recorded(replay: Replay, priors: Sequence[Prior]) -> PriorMean | None:
    """The recorded priors, as far as the policy reads them. None if they must be pooled from the log, because one of
    them lacks an input of the policy, or because they were made with profiles and the replay is without."""
    spec = replay.policy.spec
    if not spec.pooled:
        return prior_means([], [], spec.size)
    if not replay.profiles or not all(spec.prefix_of(prior.spec) for prior in priors):
        return None
    return prior_means([prior.version for prior in priors], [prior.mu[: spec.size] for prior in priors], spec.size)


class PriorsFromLog:
    """Pools priors for a replayed policy from the users' logs."""

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

    def pooled(self) -> PriorMean:
        spec = self._replay.policy.spec
        totals = itertools.accumulate(self._sums[:-1])
        means = [pooled_mean(SufficientStatistics(spec, numbers, 0)) for numbers in totals]
        return prior_means([prior.version for prior in self._priors], means, spec.size)


def recorded_model(priors: Iterable[Prior]) -> Callable[[LoggedDecision], Array]:
    """The reward model of the doubly robust estimates: the rewards q (K,) that a decision's recorded prior predicts for
    its candidates. It was fitted to rewards known before the decision."""
    by_version = {prior.version: prior for prior in priors}

    def predicted(item: LoggedDecision) -> Array:
        made, prior = item.decision, by_version.get(item.decision.prior_version)
        if prior is None:
            return np.zeros(len(made.candidates))
        return np.clip(made.phi_under(prior.spec) @ prior.mu, 0.0, 1.0)

    return predicted


def damaged(log: UserLog) -> bool:
    """Whether the user cannot be replayed: without readable statistics, how many decisions were pruned is unknown."""
    return log.statistics is None and any(item.outcome.state == "learned" for item in log.decisions)


def in_order_of_learning(log: UserLog) -> list[LoggedDecision]:
    """The learned decisions of a user, first learned first."""
    learned = [item for item in log.decisions if item.outcome.state == "learned"]
    return sorted(learned, key=lambda item: (item.outcome.settled_at_ms, item.number))


def _reward(item: LoggedDecision) -> float:
    return item.outcome.reward or 0.0
