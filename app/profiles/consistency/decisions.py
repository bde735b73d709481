"""Checks the profiles that decisions were made from: does each value equal a computation from the same events?

A decision is stored with the moment at which its profile was read and the version of each value. The check computes
each value again as of that moment, from the user's events up to that version. Invariant: a value is compared only if
its definition is unchanged and all its events are still stored.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random
from typing import Literal, NamedTuple

import msgspec

from app.features.clock import rfc3339
from app.profiles.online.cache_protocol import Profile
from app.profiles.online.compute import Computation
from app.profiles.ports import ComputeRow, LoggedProfile, LoggedProfiles
from app.telemetry import Metrics, logger

# Of a value, and of a decision: `violation` if one of its values is wrong, else `consistent` if one was compared, else
# the reason why none was.
Outcome = Literal[
    "consistent",
    "violation",
    "not read",  # the profile was sent with the request, absent, or disabled as a whole
    "not recorded",  # by a release that did not store versions
    "other definition",
    "pruned",  # the window reaches beyond the stored events
    "events deleted",  # the user's newest events of that time are gone
    "not computed",  # the feature is disabled or fails
]
NEWEST = 200
_encode = msgspec.json.Encoder().encode
log = logger("profiles.consistency")


class DecisionCheck(NamedTuple):
    """The result of checking a decision's profile. `values` has the outcome of each recorded value, by feature name.
    `wrong` has the facts to log about each wrong value."""

    decision: LoggedProfile
    outcome: Outcome
    values: Mapping[str, Outcome]
    wrong: Sequence[dict[str, object]] = ()


class DecisionChecker(msgspec.Struct, kw_only=True, eq=False):
    """Checks the profiles of decisions. `pruned_before` returns the time in milliseconds before which events have been
    pruned; 0 if none have been."""

    logged: LoggedProfiles
    computation: Computation
    pruned_before: Callable[[], Awaitable[int]]

    async def check(self, decisions: Sequence[LoggedProfile]) -> list[DecisionCheck]:
        """Compute the profiles of decisions again; return one result for each, in order. Raises `StoreUnavailable`."""
        rows = [self._rows(decision) for decision in decisions]
        profiles = iter(await self.computation.moments([row for of_one in rows for row in of_one]))
        # Read after the computation, so that it covers every event that was missing in it.
        pruned_before_ms = await self.pruned_before()
        checks: list[DecisionCheck] = []
        for decision, of_one in zip(decisions, rows, strict=True):
            computed = {index: value for _ in of_one for index, value in next(profiles).items()}
            checks.append(self._result(decision, computed, pruned_before_ms))
        # The user may have been erased, and have sent new events, since the decision was read.
        wrong = [check.decision.decision_id for check in checks if check.wrong]
        stored = await self.logged.by_id(wrong) if wrong else {}
        return [
            DecisionCheck(check.decision, "events deleted", {})
            if check.wrong and check.decision.decision_id not in stored
            else check
            for check in checks
        ]

    def _rows(self, decision: LoggedProfile) -> list[ComputeRow]:
        """The rows that compute a decision's values again, one for each version, without redefined features."""
        if decision.read is None:
            return []
        masks: dict[int, int] = {}
        for name, (fingerprint, version) in decision.read.values.items():
            bit = self.computation.registry.known_mask([name])
            if bit and self.computation.registry.named(name).fingerprint == fingerprint:
                masks[version] = masks.get(version, 0) | bit
        at_ms = decision.read.at_ms
        return [ComputeRow(decision.user_id, mask, at_ms, version=version) for version, mask in masks.items()]

    def _result(self, decision: LoggedProfile, computed: Profile, pruned_before_ms: int) -> DecisionCheck:
        read = decision.read
        if read is None or not read.values:
            recorded = read is not None or decision.origin != "service"
            return DecisionCheck(decision, "not read" if recorded else "not recorded", {})
        values: dict[str, Outcome] = dict.fromkeys(read.values, "other definition")
        wrong: list[dict[str, object]] = []
        for index, value in computed.items():
            entry = self.computation.registry[index]
            version, logged = read.values[entry.name].version, _encode(decision.features.get(entry.name))
            if value.error is not None:
                values[entry.name] = "not computed"
            elif max(value.version, 0) < version:  # below 0, versions count erasures
                values[entry.name] = "events deleted"
            elif read.at_ms - entry.window_ms < pruned_before_ms:
                values[entry.name] = "pruned"
            elif value.json == logged:
                values[entry.name] = "consistent"
            else:
                values[entry.name] = "violation"
                facts = {
                    "decision_id": decision.decision_id,
                    "feature": entry.name,
                    "logged": logged.decode(),
                    "computed": value.json.decode(),
                    "version": version,
                    "read_at": rfc3339(read.at_ms),
                }
                wrong.append(facts)
        found = values.values()
        compared: Outcome = "violation" if wrong else "consistent"
        return DecisionCheck(decision, compared if compared in found else next(iter(found)), values, wrong)


def report(check: DecisionCheck, metrics: Metrics) -> None:
    """Count the check of a decision, and log its wrong values. No user is named, because logs outlive erasures."""
    metrics.decision_checks.labels(check.outcome).inc()
    for facts in check.wrong:
        log.error("decision_violation", **facts)


class DecisionMonitor(msgspec.Struct, eq=False):
    """Checks some of the newest decisions. Each worker has one instance and calls `round` once a second."""

    checker: DecisionChecker
    per_round: int
    random: Random
    _position: int | None = None

    async def round(self) -> None:
        """Check up to `per_round` random decisions of those stored since the last call. Raises `StoreUnavailable`."""
        first = self._position is None  # then only learn the position
        newest = await self.checker.logged.newest(1 if first else NEWEST, after=self._position or 0)
        if not first:
            chosen = self.random.sample(newest, min(self.per_round, len(newest)))
            for check in await self.checker.check(chosen):
                report(check, self.checker.computation.metrics)
        self._position = newest[0].number if newest else self._position or 0
