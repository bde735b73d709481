"""Tracks which features are disabled or paused; reads answer them as null, with the reason, and do not wait for them.

A feature is *disabled* by an admin, in all processes. It is *paused* in one process when its SQL takes too long, or
fails for `FAILED_USERS` users without a success in between; its cached values are still served. It is tried again in
the background, after pauses that double. Only a successful attempt ends the pause; a success in a statement that began
before the pause does not.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from app.features.clock import Clock, rfc3339
from app.features.registry import Registry
from app.telemetry import logger

FAILED_USERS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0
log = logger("profiles.availability")


class Disabled(NamedTuple):
    """A feature that an admin has disabled, with the admin's name, the reason and the time."""

    feature: str
    disabled_by: str
    reason: str
    at_ms: int

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"disabled by {self.disabled_by} at {rfc3339(self.at_ms)}{why}"


class FeatureTrouble(msgspec.Struct):
    """A feature that fails or is paused in this process. `since_ms` is the time of the first failure, and `reason` the
    error of the last one. `users` are those for whom it failed before it was paused. `slow`: it was paused because its
    SQL took too long. `pause_s` is the length of the pause in seconds, 0 before the first, and `until` its end on the
    monotonic clock. The next attempt is made for the user `user_id`."""

    feature: str
    since_ms: int
    reason: str
    user_id: str = ""
    slow: bool = False
    users: set[str] = msgspec.field(default_factory=set)
    pause_s: float = 0.0
    until: float = 0.0


_decode_disabled = msgspec.json.Decoder(list[Disabled]).decode


class FeatureAvailability(msgspec.Struct, eq=False):
    """Tracks disabled and paused features. `switches` returns the disabled ones, as a JSON list of `Disabled` rows."""

    registry: Registry
    clock: Clock
    switches: Callable[[], str] = lambda: "[]"
    _seen: str = "[]"
    _disabled: dict[int, Disabled] = msgspec.field(default_factory=dict)
    _disabled_mask: int = 0
    _troubles: dict[int, FeatureTrouble] = msgspec.field(default_factory=dict)
    _paused_mask: int = 0

    @property
    def disabled(self) -> int:
        """The bit mask of the features that an admin has disabled. Cheap enough for every read."""
        seen = self.switches()
        if seen != self._seen:
            known = {name: index for index, name in enumerate(self.registry.names)}
            self._disabled = {known[row.feature]: row for row in _decode_disabled(seen) if row.feature in known}
            self._disabled_mask = sum(1 << index for index in self._disabled)
            self._seen = seen
        return self._disabled_mask

    @property
    def unavailable(self) -> int:
        return self.disabled | self._paused_mask

    def reason(self, index: int) -> str:
        """The reason why a feature is disabled, paused or failing; empty for a feature that works."""
        if self.disabled >> index & 1:
            return str(self._disabled[index])
        return self._troubles[index].reason if index in self._troubles else ""

    def disabled_features(self) -> dict[int, Disabled]:
        return self._disabled if self.disabled else {}

    def troubles(self) -> list[FeatureTrouble]:
        """The features that fail in this process and are not disabled, in the order of the registry."""
        off = self.disabled
        return [self._troubles[index] for index in sorted(self._troubles) if not off >> index & 1]

    def succeeded(self, index: int) -> None:
        """Record that a value was computed. The feature counts as working again, unless it is paused."""
        trouble = self._troubles.get(index)
        if trouble is not None and not trouble.pause_s:
            del self._troubles[index]

    def resume(self, index: int) -> None:
        """End the pause of a feature, because an attempt to compute it succeeded."""
        del self._troubles[index]
        self._paused_mask &= ~(1 << index)
        log.warning("feature_resumed", feature=self.registry.names[index])

    def failed(self, index: int, user_id: str, reason: str) -> None:
        """Record that a feature failed for a user. Pause the feature when it has failed for `FAILED_USERS` users."""
        trouble = self._trouble(index, user_id, reason)
        trouble.users.add(user_id)
        if len(trouble.users) >= FAILED_USERS:
            self.pause(index, user_id, reason, slow=trouble.slow)

    def pause(self, index: int, user_id: str, reason: str, *, slow: bool) -> None:
        """Pause a feature at once. `slow`: the reason is that computing this user's value took too long."""
        trouble = self._trouble(index, user_id, reason)
        trouble.slow = slow
        if self.clock.monotonic() < trouble.until < math.inf:
            return  # paused already by another value of the same statement
        trouble.users.clear()
        trouble.pause_s = min(LONGEST_PAUSE_S, trouble.pause_s * 2 or FIRST_PAUSE_S)
        trouble.until = self.clock.monotonic() + trouble.pause_s
        self._paused_mask |= 1 << index
        log.error("feature_paused", feature=trouble.feature, reason=trouble.reason, try_again_s=trouble.pause_s)

    def withheld(self, index: int, user_id: str) -> FeatureTrouble | None:
        """Return why a feature is paused; None if it is not. If the feature is paused because it failed, also choose
        `user_id` for the next attempt: so one failing user cannot keep the feature paused for all. If it was too slow,
        the next attempt is still made for the user for whom it was too slow, so that it is not resumed too early."""
        if not self._paused_mask >> index & 1:
            return None
        trouble = self._troubles[index]
        if not trouble.slow:
            trouble.user_id = user_id
        return trouble

    def due(self) -> tuple[int, str] | None:
        """A feature whose pause is over, by index, and the user to try it with; None if there is none. The feature is
        not returned again before this attempt has ended."""
        for index, trouble in self._troubles.items():
            due = trouble.pause_s and trouble.until <= self.clock.monotonic()
            if due and not self.disabled >> index & 1:
                trouble.until = math.inf
                return index, trouble.user_id
        return None

    def _trouble(self, index: int, user_id: str, reason: str) -> FeatureTrouble:
        new = FeatureTrouble(self.registry.names[index], self.clock.now_ms(), reason)
        trouble = self._troubles.setdefault(index, new)
        trouble.reason, trouble.user_id = reason, user_id
        return trouble
