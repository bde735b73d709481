"""The policies of this process: the champion, and the challenger if there is one.

Invariant: the challenger's spec begins with the champion's, so one user's statistics serve both.
"""

from __future__ import annotations

from typing import NamedTuple

from app.bandit.decisions import Role
from app.bandit.model.specs import SPECS, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, CHAMPION, Policy
from app.errors import SpecMismatch


class Policies(NamedTuple):
    """The champion serves; the challenger is evaluated and may serve a share of the users."""

    champion: Policy
    challenger: Policy | None

    @classmethod
    def of(cls, *, shadow: bool) -> Policies:
        """The policies of this release; the challenger only with `shadow`."""
        return cls(CHAMPION, CHALLENGER if shadow else None)

    @property
    def longest(self) -> Spec:
        """The spec that all decisions are logged under, and to which statistics grow."""
        return (self.challenger or self.champion).spec

    def shorter(self) -> list[Spec]:
        """The specs whose statistics can grow to the longest."""
        return [spec for spec in SPECS.values() if spec != self.longest and spec.prefix_of(self.longest)]

    def policy(self, role: Role) -> Policy:
        """The policy in a role; without a challenger, the champion in both."""
        return self.challenger or self.champion if role == "challenger" else self.champion

    def grown(
        self, statistics: SufficientStatistics | None, phi_spec: Spec | None = None
    ) -> tuple[SufficientStatistics, Spec]:
        """The statistics, grown to the longest of three specs: their own, `longest`, and `phi_spec`; and that spec.

        `phi_spec` is the spec of a vector that is about to be learned. None stands for the statistics of a new user.
        Statistics never shrink, whichever policies run.

        Raises:
            SpecMismatch: the specs are not prefixes of each other.
        """
        wanted = self.longest
        if phi_spec is not None and phi_spec.size > wanted.size:
            wanted = phi_spec
        own = wanted if statistics is None else SPECS[statistics.spec_hash]
        reached = own if own.size >= wanted.size else wanted
        # The sizes alone would allow adding a vector to the sums of other inputs.
        if phi_spec is not None and not phi_spec.prefix_of(reached):
            raise SpecMismatch(
                f"statistics of {reached.id} {reached.version} take no vector of {phi_spec.id} {phi_spec.version}"
            )
        if statistics is None:
            return SufficientStatistics.none(wanted), wanted
        return (statistics if reached is own else statistics.grown(own, reached)), reached
