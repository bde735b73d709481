"""Rows of a training set that name a decision: they have exactly the values that the decision was made from."""

from __future__ import annotations

import msgspec

from app.errors import InvalidInput, Issue
from app.profiles.history.moments import Moments
from app.profiles.online.cache_protocol import FeatureValue, Profile, not_computed
from app.profiles.ports import ComputeRow, LoggedProfile


def served_row(decision: LoggedProfile | None, place: str, moments: Moments, mask: int) -> tuple[Profile, ComputeRow]:
    """The row of a training set for a decision, with the features in the mask: the values that the decision was made
    from, and the row that computes the other features.

    A feature whose definition has changed since, or that did not exist then, is computed as of the moment of the read,
    from the user's events up to the highest version of the values. A feature that was null, because it was disabled or
    failing, is null again.

    Raises:
        InvalidInput: the decision does not exist (None), its read is not recorded, or events that a computation needs
            have been pruned. The issue names `place`.
    """
    if decision is None or decision.read is None:
        raise InvalidInput("a decision cannot be used", [Issue(place, _problem(decision))])
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
        raise InvalidInput("a decision cannot be used", [Issue(place, problem.detail)])
    return served, ComputeRow(decision.user_id, rest, at_ms, version=decision.read.version)


def _problem(decision: LoggedProfile | None) -> str:
    if decision is None:
        return "there is no such decision; it may have been pruned or erased"
    if decision.origin == "service":
        return "it was made by a release that did not record how the profile was read"
    return "the service did not read its profile; it was sent with the request, or null"
