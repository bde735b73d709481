"""Linear Thompson sampling with exact propensities.

S. Agrawal, N. Goyal: Thompson sampling for contextual bandits with linear payoffs, ICML 2013, algorithm 1, with a prior
(Λ, μ) of the spec. The posterior of the weights is N(θ̂, v²A⁻¹) with A = Λ + S and θ̂ = A⁻¹(Λμ + y). M draws from it
give π̂(a), the share of draws in which candidate a is best. The policy is π(a) = (1-ε) π̂(a) + ε/K for K candidates, and
the chosen candidate is sampled from π. M does not change a candidate's marginal probability, since π̂ has the same
expected value for every M; more draws only make the logged π less coarse.

Invariant: a policy reads only the inputs that its spec names, which come first in φ, in the statistics, in the prior's
mean and in the random numbers. So its answers are bit for bit the same before and after the statistics grow to a longer
spec, and champion and challenger read the same statistics of a user.
"""

import hashlib
from typing import Any, Final, Literal, NamedTuple

import msgspec

from app.bandit.model.inputs import NEWEST, SPEC_V1, Array, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.numpy_on_demand import np
from app.errors import SpecMismatch

EPSILON: Final = 0.1
SCALE: Final = 0.2  # v
DRAWS: Final = 128  # M
TIE: Final = 1e-9  # scores closer than this are equal: rounding depends on a candidate's row in the matrix
DIGITS: Final = 12  # decimals of an answered score; those after them are rounding errors
# Random numbers derive from the decision's id, so they are the same in every process. Each use has a stream of its own,
# so its numbers do not depend on how many numbers another use draws.
OLD: Final = "old"  # the normals for the inputs of the first spec
NEW: Final = "new"  # the normals for the inputs that later specs add
ACTION: Final = "action"  # the number that samples the chosen candidate
Role = Literal["champion", "challenger"]
OTHER: Final[dict[Role, Role]] = {"champion": "challenger", "challenger": "champion"}


class Ranking(NamedTuple):
    """One policy's result for K candidates. `scores` (K,) are the posterior means of the candidates' rewards. `pi` (K,)
    are their propensities: the probabilities with which the policy chooses them."""

    scores: Array
    pi: Array


class Policy(msgspec.Struct, frozen=True):
    """A policy: linear Thompson sampling over the inputs of one spec. `scale` is v in the formulas."""

    id: str
    spec: Spec
    scale: float = SCALE

    def decide(
        self, decision_id: str, statistics: SufficientStatistics, mu: Array, phi: Array, explore: bool
    ) -> tuple[Ranking, Array]:
        """Rank K candidates, whose input vectors are the rows of φ. Return the ranking as it is answered, with rounded
        scores, and the posterior mean θ̂ (D,) of the weights. Without exploration, π is 1 for the candidate with the
        highest score and 0 for the others. A policy whose spec is not pooled ignores the mean `mu` of the pooled prior.
        Raises `SpecMismatch` if the spec of the statistics does not begin with the inputs of this policy's spec."""
        size, precisions = self.spec.size, self.spec.precisions
        if not self.spec.prefix_of(statistics.spec):
            raise SpecMismatch(f"policy {self.id} cannot read statistics of spec {statistics.spec.hash[:12]}")
        a, b = statistics.leading(size)
        a.reshape(-1)[:: size + 1] += precisions
        if self.spec.pooled:
            b = precisions * mu[:size] + b
        theta = np.asarray(np.linalg.solve(a, b), np.float64)
        # The memory layout of a φ that never had more columns, so that every result has the same bits.
        own = np.ascontiguousarray(phi[:, :size])
        means = own @ theta
        scores: Array = means.round(DIGITS)
        if not explore:
            return Ranking(scores, np.eye(len(scores))[best(scores)]), theta
        drawn = roots(a, own).T @ noise(decision_id, size)
        drawn *= self.scale
        drawn += means[:, None]
        return Ranking(scores, propensities(drawn)), theta


CHAMPION: Final = Policy("lints-v1", SPEC_V1)
CHALLENGER: Final = Policy(f"lints-v{NEWEST.version}", NEWEST)
# The champion's inputs with a pooled prior. It is evaluated, and never serves.
POOLED_CHAMPION: Final = Policy("lints-v1+pool", msgspec.structs.replace(SPEC_V1, pooled=True))


class Policies(NamedTuple):
    """The champion, which serves users, and the challenger, which is evaluated and may serve a share of the users."""

    champion: Policy = CHAMPION
    challenger: Policy | None = CHALLENGER

    @property
    def longest(self) -> Spec:
        """The spec with the most inputs. Decisions are logged under it, and users' statistics are extended to it."""
        return (self.challenger or self.champion).spec

    def policy(self, role: Role) -> Policy:
        """The policy that has the role. If there is no challenger, the champion has both roles."""
        return self.challenger or self.champion if role == "challenger" else self.champion

    def grown(self, statistics: SufficientStatistics | None, phi_spec: Spec | None = None) -> SufficientStatistics:
        """Pad the statistics with zeros to the longest of three specs: their own, `self.longest`, and `phi_spec`, the
        spec of a vector to learn. None stands for a new user. The result is never shorter than the given statistics.
        Raises `SpecMismatch` if the longest spec does not begin with the inputs of the others."""
        wanted = self.longest
        if phi_spec is not None and phi_spec.size > wanted.size:
            wanted = phi_spec
        found = SufficientStatistics.none(wanted) if statistics is None else statistics
        if found.spec.size < wanted.size:
            found = found.grown(wanted)
        if phi_spec is not None and not phi_spec.prefix_of(found.spec):  # though it may have the same length
            raise SpecMismatch(f"statistics of spec {found.spec.hash[:12]} take no vector of {phi_spec.hash[:12]}")
        return found


def roots(a: Array, phi: Array) -> Array:
    """R = L⁻¹φᵀ (D, K), where A = LLᵀ. With standard normals e (D,), φθ̂ + vRᵀe (K,) is one draw of the scores."""
    return np.asarray(np.linalg.solve(np.linalg.cholesky(a), phi.T), np.float64)


class _Seed(NamedTuple):
    """Seeds a generator with the 256 bits of a SHA-256 digest; NumPy's SeedSequence takes ten times as long."""

    digest: bytes

    def generate_state(self, n_words: int, dtype: Any) -> Any:
        return np.frombuffer(self.digest, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)


def _digest(decision_id: str, stream: str) -> bytes:
    return hashlib.sha256(f"{decision_id}:{stream}".encode()).digest()


def fill_normal(place: Array, decision_id: str, stream: str) -> None:
    """Fill the contiguous array `place` with standard normals, which the decision id and the stream determine."""
    np.random.bit_generator.ISeedSequence.register(_Seed)  # not at import, which would import NumPy
    bits = np.random.PCG64DXSM(_Seed(_digest(decision_id, stream)))  # type: ignore[arg-type]  # its protocol suffices
    np.random.Generator(bits).standard_normal(out=place)


def uniform(decision_id: str, stream: str) -> float:
    """A pseudo-random number in [0, 1) with 53 bits, which the decision id and the stream determine."""
    return (int.from_bytes(_digest(decision_id, stream)[:8], "little") >> 11) * 2.0**-53


def noise(decision_id: str, size: int, draws: int = DRAWS) -> Array:
    """Standard normals (`size`, `draws`) for a decision. Row i belongs to input i, and is the same for every policy."""
    drawn = np.empty((size, draws))
    old = min(size, SPEC_V1.size)
    fill_normal(drawn[:old], decision_id, OLD)
    if size > old:
        fill_normal(drawn[old:], decision_id, NEW)
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
    place = int(pi.cumsum().searchsorted(uniform(decision_id, ACTION), side="right"))
    return min(place, len(pi) - 1)  # rounding may leave the sum of π below the draw


def best(scores: Array) -> int:
    """The index of the highest score; if several are equal, the first of them."""
    return int(np.argmax(scores))
