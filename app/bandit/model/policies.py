"""The policies of this process: the champion, and the challenger where there is one.

Invariant: the challenger's spec begins with the champion's, so one user's evidence serves both.
"""

from __future__ import annotations

from typing import NamedTuple

from app.bandit.decisions import Role
from app.bandit.model.policy import CHALLENGER, CHAMPION, Policy
from app.bandit.model.specs import SPECS, Spec
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.errors import SpecMismatch


class Policies(NamedTuple):
    """Who serves and who is tried."""

    champion: Policy
    challenger: Policy | None

    @classmethod
    def of(cls, *, shadow: bool) -> Policies:
        """This release's, with or without the challenger."""
        return cls(CHAMPION, CHALLENGER if shadow else None)

    @property
    def longest(self) -> Spec:
        """The spec that all decisions are logged under, and to which evidence grows."""
        return (self.challenger or self.champion).spec

    def shorter(self) -> list[Spec]:
        """The specs whose evidence is yet to grow."""
        return [spec for spec in SPECS.values() if spec != self.longest and spec.prefix_of(self.longest)]

    def policy(self, role: Role) -> Policy:
        """Who has a role; the champion has that of an absent challenger."""
        return self.challenger or self.champion if role == "challenger" else self.champion

    def brought_up(
        self, evidence: SufficientStatistics | None, phi_spec: Spec | None = None
    ) -> tuple[SufficientStatistics, Spec]:
        """The statistics under the longest of its own spec, this line-up's and that of a vector; and that spec.

        What has once grown stays so, whoever is in the line-up. Raises `SpecMismatch` for specs of which neither begins
        with the other.
        """
        wanted = self.longest
        if phi_spec is not None and phi_spec.size > wanted.size:
            wanted = phi_spec
        own = wanted if evidence is None else SPECS[evidence.spec_hash]
        reached = own if own.size >= wanted.size else wanted
        # By length alone a vector could be added to sums of other inputs.
        if phi_spec is not None and not phi_spec.prefix_of(reached):
            raise SpecMismatch(
                f"evidence of {reached.id} {reached.version} takes no vector of {phi_spec.id} {phi_spec.version}"
            )
        if evidence is None:
            return SufficientStatistics.none(wanted), wanted
        return (evidence if reached is own else evidence.grown(own, reached)), reached
