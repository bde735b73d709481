"""Which features can be computed and served now: the others are null, with the reason, and delay nothing.

A feature is *disabled* by an admin, in all processes. It is *paused* in one process once its SQL has taken too long, or
has failed for `FAILED_USERS` users in a row; then it is tried again in the background, after a pause that doubles.
Only such an attempt ends the pause: a value that was already being computed when the feature was paused says nothing
about the user that it was paused for. While a feature is paused, its cached values are still served: no event has made
them untrue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from app.features.clock import Clock, rfc3339
from app.features.registry import Registry
from app.telemetry import logger

FAILED_USERS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0
log = logger("profiles.availability")


class Disabled(NamedTuple):
    """A feature that an admin has switched off."""

    feature: str
    disabled_by: str
    reason: str
    at_ms: int

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"disabled by {self.disabled_by} at {rfc3339(self.at_ms)}{why}"


class FeatureTrouble(NamedTuple):
    """A feature that fails, and since when."""

    feature: str
    reason: str
    since_ms: int


@dataclass(slots=True)
class _Trouble:
    since_ms: int
    reason: str
    user_id: str = ""  # to try it with
    slow: bool = False
    users: set[str] = field(default_factory=set)
    pause_s: float = 0.0  # 0: not paused
    until: float = 0.0


_decode_disabled = msgspec.json.Decoder(list[Disabled]).decode


class FeatureAvailability:
    """The features of one process."""

    def __init__(self, registry: Registry, clock: Clock, switches: Callable[[], str] = lambda: "[]") -> None:
        """`switches` gives what is disabled, as JSON of `Disabled` rows, as of less than a second ago."""
        self._registry = registry
        self._clock = clock
        self._switches = switches
        self._seen = "[]"
        self._disabled: dict[int, Disabled] = {}
        self._disabled_mask = 0
        self._troubles: dict[int, _Trouble] = {}
        self._paused_mask = 0

    @property
    def disabled(self) -> int:
        """The mask of the disabled features. Every read asks."""
        seen = self._switches()
        if seen != self._seen:
            known = {name: index for index, name in enumerate(self._registry.names)}
            self._disabled = {known[row.feature]: row for row in _decode_disabled(seen) if row.feature in known}
            self._disabled_mask = sum(1 << index for index in self._disabled)
            self._seen = seen
        return self._disabled_mask

    @property
    def unavailable(self) -> int:
        """The mask of the features that must not be computed now."""
        return self.disabled | self._paused_mask

    def reason(self, index: int) -> str:
        """Why an unavailable feature is null."""
        if self.disabled >> index & 1:
            return str(self._disabled[index])
        return self._troubles[index].reason if index in self._troubles else ""

    def paused(self, index: int) -> FeatureTrouble | None:
        """The trouble of a feature that is paused; None if it is not."""
        if not self._paused_mask >> index & 1:
            return None
        return self._told(index)

    def disabled_features(self) -> dict[int, Disabled]:
        """Everything that is disabled, by its index."""
        return self._disabled if self.disabled else {}

    def troubles(self) -> list[FeatureTrouble]:
        """The features that fail now, in the order of the registry; a disabled one is no trouble."""
        off = self.disabled
        return [self._told(index) for index in sorted(self._troubles) if not off >> index & 1]

    def _told(self, index: int) -> FeatureTrouble:
        trouble = self._troubles[index]
        return FeatureTrouble(self._registry.names[index], trouble.reason, trouble.since_ms)

    def succeeded(self, index: int) -> None:
        """A value of the feature was computed for a read."""
        trouble = self._troubles.get(index)
        if trouble is not None and not trouble.pause_s:
            del self._troubles[index]

    def resume(self, index: int) -> None:
        """A paused feature was computed by an attempt."""
        del self._troubles[index]
        self._paused_mask &= ~(1 << index)
        log.warning("feature_resumed", feature=self._registry.names[index])

    def failed(self, index: int, user_id: str, reason: str) -> None:
        """A user's value could not be computed."""
        trouble = self._noted(index, user_id, reason)
        trouble.users.add(user_id)
        if len(trouble.users) >= FAILED_USERS:
            self._pause(index, trouble)

    def pause(self, index: int, user_id: str, reason: str, *, slow: bool) -> None:
        """Do not compute the feature for a while. `slow`: computing this user's value took too long."""
        trouble = self._noted(index, user_id, reason)
        trouble.slow = slow
        self._pause(index, trouble)

    def withheld(self, index: int, user_id: str) -> None:
        """A paused feature was asked for.

        One that fails at once, if only for some users, is tried next with this user: then it cannot stay paused for all
        because of one. One that is slow is tried with the user it was slow for: resuming it too early delays reads.
        """
        trouble = self._troubles.get(index)
        if trouble is not None and not trouble.slow:
            trouble.user_id = user_id

    def due(self) -> tuple[int, str] | None:
        """A paused feature whose pause is over, and a user to try it with; it counts as tried now."""
        now, off = self._clock.monotonic(), self.disabled
        for index, trouble in self._troubles.items():
            if trouble.pause_s and trouble.until <= now and not off >> index & 1:
                trouble.until = math.inf  # until the attempt ends
                return index, trouble.user_id
        return None

    def _noted(self, index: int, user_id: str, reason: str) -> _Trouble:
        trouble = self._troubles.setdefault(index, _Trouble(self._clock.now_ms(), reason))
        trouble.reason, trouble.user_id = reason, user_id
        return trouble

    def _pause(self, index: int, trouble: _Trouble) -> None:
        if self._clock.monotonic() < trouble.until < math.inf:
            return  # another value of the same statement has paused it
        trouble.users.clear()
        trouble.pause_s = min(LONGEST_PAUSE_S, trouble.pause_s * 2 or FIRST_PAUSE_S)
        trouble.until = self._clock.monotonic() + trouble.pause_s
        self._paused_mask |= 1 << index
        log.error(
            "feature_paused", feature=self._registry.names[index], reason=trouble.reason, try_again_s=trouble.pause_s
        )
