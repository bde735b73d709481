"""Rows of a training set that are given by a decision's id: they repeat the values that the decision was made from."""

from __future__ import annotations

import msgspec

from app.errors import InvalidInput, Issue
from app.profiles.history.moments import Moments
from app.profiles.online.cache_protocol import FeatureValue, Profile, not_computed
from app.profiles.ports import ComputeRow, LoggedProfile


def served_row(decision: LoggedProfile | None, path: str, moments: Moments, mask: int) -> tuple[Profile, ComputeRow]:
    """Make the training set row of a decision, with the features in the mask. Return the values that the decision was
    made from, and a `ComputeRow` for the features that it did not read or whose definition has changed since.

    These features are to be computed as of the moment at which the decision read the profile, from the user's events up
    to the highest version of its values. A feature that was null then, because it was disabled or failing, is null
    again.

    Raises:
        InvalidInput: the decision does not exist (None), it does not record how its profile was read, or events that a
            computation needs have been pruned. `path` is the path in the issue.
    """
    if decision is None or decision.read is None:
        raise InvalidInput("a decision cannot be used", [Issue(path, _problem(decision))])
    at_ms, values = decision.read.at_ms, decision.read.values
    served: Profile = {}
    rest = 0
    for index, entry in enumerate(moments.registry):
        if not mask >> index & 1:
            continue
        value = values.get(entry.name)
        if value is not None and value.fingerprint == entry.fingerprint:
            json = msgspec.json.encode(decision.features.get(entry.name))
            served[index] = FeatureValue(value.fingerprint.encode(), value.version, at_ms, None, json)
        elif value is None and entry.name in decision.features:
            served[index] = not_computed(at_ms, "it was disabled or failing when a decision read it")
        else:
            rest |= 1 << index
    if rest and (problem := moments.problem(at_ms, None, rest)) is not None:
        raise InvalidInput("a decision cannot be used", [Issue(path, problem.detail)])
    return served, ComputeRow(decision.user_id, rest, at_ms, version=decision.read.version)


def _problem(decision: LoggedProfile | None) -> str:
    if decision is None:
        return "there is no such decision; it may have been pruned or erased"
    if decision.origin == "service":
        return "it was made by a release that did not record how the profile was read"
    return "the service did not read its profile; it was sent with the request, or null"
