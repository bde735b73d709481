"""A record of the profile that a decision read, from which the event log gives the same values again."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class ValueRead(NamedTuple):
    """A value of a profile: the fingerprint of its definition, and its version, the sequence number of the user's
    newest event in the computation."""

    fingerprint: str
    version: int


class ProfileRead(msgspec.Struct, frozen=True):
    """A read of a profile, as stored with the decision that was made from the profile.

    Each value equals a computation as of `at_ms` from the user's events up to the version of the value. `values` is by
    feature name. Features that were disabled or failing, and so read as null, are left out.
    """

    at_ms: int
    values: dict[str, ValueRead]

    @property
    def versions(self) -> dict[str, int]:
        """The version of each value, by feature name."""
        return {name: value.version for name, value in self.values.items()}

    @property
    def version(self) -> int:
        """The highest version of a value; 0 without values."""
        return max(self.versions.values(), default=0)
