"""Linear Thompson sampling with exact propensities.

S. Agrawal, N. Goyal: Thompson sampling for contextual bandits with linear payoffs, ICML 2013, algorithm 1, with a prior
(Λ, μ) of the spec. The posterior of the weights is N(θ̂, v²A⁻¹) with A = Λ + S and θ̂ = A⁻¹(Λμ + y). M draws from it
give π̂(a), the share of draws in which candidate a is best. The policy is π(a) = (1-ε) π̂(a) + ε/K for K candidates, and
the chosen candidate is sampled from π. M does not change a candidate's marginal probability, since π̂ has the same
expected value for every M; more draws only make the logged π less coarse.

Invariant: a policy reads only the inputs that its spec names, which come first in φ, in the statistics and in the
random numbers. So its answers are bit for bit the same before and after the statistics grow to a longer spec. The first
inputs of the challenger's spec are those of the champion's, so both policies read the same statistics of a user.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from app.bandit.decisions import Ranking, Role
from app.bandit.model.inputs import NEWEST, SPEC_V1, Array, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.numpy_on_demand import np
from app.errors import SpecMismatch

EPSILON: Final = 0.1
SCALE: Final = 0.2  # v
DRAWS: Final = 128  # M
TIE: Final = 1e-9  # scores closer than this are equal: rounding depends on a candidate's row in the matrix
DIGITS: Final = 12  # decimals of an answered score; those after them are rounding errors


class Policy(msgspec.Struct, frozen=True):
    """A policy that chooses tips: linear Thompson sampling over the inputs of one spec. `scale` is v."""

    id: str
    spec: Spec
    scale: float = SCALE

    def decide(
        self, decision_id: str, statistics: SufficientStatistics, mu: Array | None, phi: Array, explore: bool
    ) -> tuple[Ranking, Array]:
        """Rank K candidates; each row of φ is the input vector of one. Return the ranking as it is answered, and the
        posterior mean θ̂ (D,) of the weights. Scores are rounded to `DIGITS` decimals. Without exploration, π is 1 for
        the candidate with the highest score and 0 for the others.

        φ and the statistics may have more inputs than this policy's spec, its list of inputs, if they begin with these
        inputs. `mu` is the mean of the pooled prior, None for zeros; a policy whose spec is not pooled ignores it.

        Raises:
            SpecMismatch: the statistics belong to a spec that does not begin with the inputs of this policy's spec, φ
                has fewer columns than the policy's spec has inputs, or μ does not have one element per input.
        """
        size, precisions = self.spec.size, self.spec.precisions
        if not self.spec.prefix_of(statistics.spec):
            raise SpecMismatch(f"policy {self.id} cannot read statistics of spec {statistics.spec.hash[:12]}")
        if phi.shape[1] < size:
            raise SpecMismatch(f"policy {self.id} has {size} inputs, the vectors {phi.shape[1]}")
        a, b = statistics.leading(size)
        a.reshape(-1)[:: size + 1] += precisions
        if mu is not None and self.spec.pooled:
            if len(mu) != size:
                raise SpecMismatch(f"policy {self.id} has {size} inputs, the prior's mean {len(mu)}")
            b = precisions * mu + b
        theta = np.asarray(np.linalg.solve(a, b), np.float64)
        # The memory layout of a φ that never had more columns, so that every result has the same bits.
        own = np.ascontiguousarray(phi[:, :size])
        means = own @ theta
        scores = np.round(means, DIGITS)
        if not explore:
            return Ranking(scores, np.eye(len(scores))[best(scores)]), theta
        drawn = roots(a, own).T @ noise(decision_id, size)
        drawn *= self.scale
        drawn += means[:, None]
        return Ranking(scores, propensities(drawn)), theta


CHAMPION: Final = Policy("lints-v1", SPEC_V1)
CHALLENGER: Final = Policy(f"lints-v{NEWEST.version}", NEWEST)
# The pool without the new inputs; only evaluated. It reads the first elements of the challenger's pooled prior.
POOLED_CHAMPION: Final = Policy("lints-v1+pool", msgspec.structs.replace(SPEC_V1, pooled=True))


class Policies(NamedTuple):
    """The champion, which serves users, and the challenger, which is evaluated and may serve a share of the users."""

    champion: Policy
    challenger: Policy | None

    @classmethod
    def of(cls, *, shadow: bool) -> Policies:
        """The policies of this release. `shadow`: whether the challenger is one of them."""
        return cls(CHAMPION, CHALLENGER if shadow else None)

    @property
    def longest(self) -> Spec:
        """The spec with the most inputs. Decisions are logged under it, and users' statistics are extended to it."""
        return (self.challenger or self.champion).spec

    def policy(self, role: Role) -> Policy:
        """The policy that has the role. If there is no challenger, the champion has both roles."""
        return self.challenger or self.champion if role == "challenger" else self.champion

    def grown(self, statistics: SufficientStatistics | None, phi_spec: Spec | None = None) -> SufficientStatistics:
        """Pad the statistics with zeros to the longest of: their own spec, `self.longest` and `phi_spec`.

        `statistics` is None for a new user, `phi_spec` the spec of a vector that is about to be learned. Statistics
        never become shorter, whichever policies run.

        Raises:
            SpecMismatch: the longest of these specs does not begin with the inputs of the others.
        """
        wanted = self.longest
        if phi_spec is not None and phi_spec.size > wanted.size:
            wanted = phi_spec
        found = SufficientStatistics.none(wanted) if statistics is None else statistics
        if found.size < wanted.size:
            found = found.grown(wanted)
        # The sizes alone would allow adding a vector to the sums of other inputs.
        if phi_spec is not None and not phi_spec.prefix_of(found.spec):
            raise SpecMismatch(
                f"statistics of {found.spec.id} {found.spec.version} take no vector of {phi_spec.id} {phi_spec.version}"
            )
        return found


def roots(a: Array, phi: Array) -> Array:
    """The matrix R = L⁻¹φᵀ (D, K), where A = LLᵀ. With standard normals e (D,), φθ̂ + vRᵀe (K,) is one draw of the
    scores."""
    return np.asarray(np.linalg.solve(np.linalg.cholesky(a), phi.T), np.float64)


def noise(decision_id: str, size: int, draws: int = DRAWS) -> Array:
    """Standard normals (`size`, `draws`) for a decision, derived from its id. Row i belongs to input i, and is the same
    for every policy that has this input."""
    from app.bandit.model import random_streams  # noqa: PLC0415  # it imports NumPy

    drawn = np.empty((size, draws))
    old = min(size, SPEC_V1.size)
    random_streams.fill_normal(drawn[:old], decision_id, random_streams.OLD)
    if size > old:
        random_streams.fill_normal(drawn[old:], decision_id, random_streams.NEW)
    return drawn


def propensities(drawn: Array) -> Array:
    """The propensities π (K,) of K candidates, from their scores in M draws (K, M): π = (1-ε) · wins / M + ε/K. A
    candidate wins a draw if its score is the highest. Candidates that tie share the win."""
    candidates, draws = drawn.shape
    winners = drawn >= drawn.max(axis=0) - TIE
    wins = winners.sum(axis=1)
    if np.count_nonzero(winners) > draws:
        wins = (winners / np.count_nonzero(winners, axis=0)).sum(axis=1)
    pi: Array = (1 - EPSILON) * (wins / draws) + EPSILON / candidates
    return pi


def sample(pi: Array, decision_id: str) -> int:
    """Sample the index of a candidate from π (K,). The same decision and π always give the same index."""
    from app.bandit.model import random_streams  # noqa: PLC0415  # it imports NumPy

    draw = random_streams.uniform(decision_id, random_streams.ACTION)
    place = int(np.searchsorted(np.cumsum(pi), draw, side="right"))
    return min(place, len(pi) - 1)  # rounding may leave the sum of π below the draw


def best(scores: Array) -> int:
    """The index of the highest score; if several are equal, the first of them."""
    return int(np.argmax(scores))
