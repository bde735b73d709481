"""Profiles as of past moments: for which moments they can be computed, the timeline of a user, and decisions' values.

Invariants: no moment lies in the future. A feature has a value only if all events of its window are still stored, since
a part of them gives a plausible but wrong value. An event counts from its event time on, even if it arrived later,
unless the request sets `known_at`. The timeline does not set it.
"""

import msgspec

from app.errors import InvalidInput, Issue
from app.features.clock import DAY_MS, Clock, rfc3339
from app.features.registry import Registry, indices
from app.profiles.online.cache_protocol import FeatureValue, Profile, not_computed
from app.profiles.ports import ComputeRow, LoggedProfile

DAYS = 30


class Moments(msgspec.Struct, frozen=True):
    """Checks whether features can be computed as of a past moment. Events before `deleted_before_ms` have been deleted.
    Some of them may be within `retention_days`, if the retention was shorter before."""

    registry: Registry
    retention_days: int
    clock: Clock
    deleted_before_ms: int = 0

    def future(self, at_ms: int, path: str) -> Issue | None:
        """Why `at_ms`, the value of the field `path`, is not a past moment; None if it is one."""
        now_ms = self.clock.now_ms()
        if at_ms > now_ms:
            return Issue(path, f"lies in the future; the time of the service is {rfc3339(now_ms)}")
        return None

    def problem(self, at_ms: int, mask: int, path: str = "as_of") -> Issue | None:
        """Why the features in the mask cannot be computed as of `at_ms`; None if they can."""
        if (issue := self.future(at_ms, path)) is not None:
            return issue
        window_ms = self.registry.longest_window_ms(mask)
        kept_from_ms = max(self.clock.now_ms() - self.retention_days * DAY_MS, self.deleted_before_ms)
        if at_ms - window_ms < kept_from_ms:
            earliest = rfc3339(kept_from_ms + window_ms)
            return Issue(path, f"reaches back beyond kept history; the earliest possible is {earliest}")
        return None

    def timeline(self, user_id: str, now_ms: int) -> list[ComputeRow]:
        """The rows that compute a user's features as of `DAYS` moments that are a day apart, the last of them `now_ms`.
        A feature is left out if its window reaches beyond the retention."""
        bits = [1 << index for index in range(len(self.registry))]
        moments = [now_ms - days_ago * DAY_MS for days_ago in reversed(range(DAYS))]
        masks = [sum(bit for bit in bits if not self.problem(at_ms, bit)) for at_ms in moments]
        return [ComputeRow(user_id, mask, at_ms) for at_ms, mask in zip(moments, masks, strict=True)]


def served_row(decision: LoggedProfile | None, path: str, moments: Moments, mask: int) -> tuple[Profile, ComputeRow]:
    """The training set row of a decision: the values that it was made from, and a `ComputeRow` for the other features
    in the mask. These are the features that the decision did not read, or that were redefined since. The `ComputeRow`
    computes them as of the moment when the decision's profile was read, from the user's events up to the highest
    version in that profile. A feature that was null then, because it was disabled or failing, is null again.

    Raises:
        InvalidInput: the decision does not exist (None), it does not record how its profile was read, or events that a
            computation needs have been pruned. The error names `path` as the place.
    """
    if decision is None or decision.read is None:
        reason = "the service did not read its profile; it was sent with the request, or null"
        if decision is None:
            reason = "there is no such decision; it may have been pruned or erased"
        elif decision.origin == "service":
            reason = "it was made by a release that did not record how the profile was read"
        raise InvalidInput("a decision cannot be used", [Issue(path, reason)])
    at_ms, values = decision.read.at_ms, decision.read.values
    served: Profile = {}
    rest = 0
    for index in indices(mask):
        entry = moments.registry[index]
        value = values.get(entry.name)
        if value is not None and value.fingerprint == entry.fingerprint:
            json = msgspec.json.encode(decision.features.get(entry.name))
            served[index] = FeatureValue(value.fingerprint.encode(), value.version, at_ms, None, json)
        elif value is None and entry.name in decision.features:
            served[index] = not_computed(at_ms, "it was disabled or failing when a decision read it")
        else:
            rest |= 1 << index
    if rest and (problem := moments.problem(at_ms, rest, path)) is not None:
        raise InvalidInput("a decision cannot be used", [problem])
    return served, ComputeRow(decision.user_id, rest, at_ms, version=decision.read.version)
