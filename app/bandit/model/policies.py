"""The policies that this process runs: the champion, and the challenger if there is one.

Invariant: the first inputs of the challenger's spec are those of the champion's, so both policies read the same
statistics of a user.
"""

from __future__ import annotations

from typing import NamedTuple

from app.bandit.decisions import Role
from app.bandit.model.inputs import Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, Policy
from app.errors import SpecMismatch


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
