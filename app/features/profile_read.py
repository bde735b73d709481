"""How a decision's profile was read: enough to compute the same values again from the event log."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class ValueRead(NamedTuple):
    """One value of a profile: the fingerprint of its definition, and the version that the computation saw."""

    fingerprint: str
    version: int


class ProfileRead(msgspec.Struct, frozen=True):
    """A read of a profile, as stored with the decision that it was for.

    Each value equals a computation as of `at_ms` from the user's events up to its version. `values` are by feature
    name; features that were disabled or failing, and so read as null, are left out.
    """

    at_ms: int
    values: dict[str, ValueRead]

    @property
    def version(self) -> int:
        """The highest version of a value; 0 without values."""
        return max((value.version for value in self.values.values()), default=0)
