"""A row that is a decision has the values that were served; only features that it did not read are computed."""

import json
from typing import Any

import pytest

from app.errors import InvalidInput
from app.features.clock import DAY_MS
from app.features.registry import Registry
from app.profiles.history import Moments, served_row
from app.profiles.ports import LoggedProfile
from tests.integration.profiles.consistency.test_decisions import score
from tests.support.clock import NOW_MS
from tests.support.entries import entry
from tests.support.events import feedback, served
from tests.support.registry import REGISTRY
from tests.support.service import PausableService
from tests.support.service_group import ServiceGroup

pytestmark = pytest.mark.both_engines

VOLUME = "tip_volume_30d"
RATE = "completion_rate_30d"


def moments(service: PausableService) -> Moments:
    return Moments(service.registry, service.inner.settings.retention_days, service.clock)


async def newest(service: PausableService) -> LoggedProfile:
    (found,) = await service.inner.logged_profiles.newest(1)
    return found


async def history(service: PausableService, decision: LoggedProfile) -> tuple[dict[str, Any], list[str]]:
    """The features of the row, and the names of those that are computed."""
    values, row = served_row(decision, "row", moments(service), service.registry.full_mask)
    (rest,) = await service.reader.read_as_of([row])
    profile = values | rest
    assert profile.keys() == set(range(len(service.registry)))
    return service.decoded(profile), [service.registry.names[index] for index in rest]


async def test_new_and_changed_features_are_computed_from_the_events_of_that_time(
    service: PausableService, group: ServiceGroup
) -> None:
    await service.send(served("ann"), feedback("ann"), served("ann", NOW_MS - 1))
    decision = await score(service)
    await service.send(served("ann", NOW_MS - 2), feedback("ann", NOW_MS - 2, "dismissed"))
    changed = entry(name=RATE, compute="SELECT user_id, COUNT(*) AS value FROM feedback GROUP BY user_id")
    kept = [item for item in REGISTRY if item.name != RATE]
    release = await group.open(Registry([*kept, changed, entry(name="new")]))
    features, computed = await history(release, await newest(release))
    assert sorted(computed) == [RATE, "new"]
    assert decision.profile is not None
    assert features == {**decision.profile, RATE: 1, "new": 2}


async def test_feature_that_was_disabled_is_null_again(service: PausableService) -> None:
    await service.send(served("ann"))
    await service.switch(VOLUME, on=False)
    await score(service)
    await service.switch(VOLUME, on=True)
    decision = await newest(service)
    features, computed = await history(service, decision)
    assert (features[VOLUME], computed) == (None, [])
    values, _ = served_row(decision, "row", moments(service), service.registry.mask([VOLUME]))
    ((index, value),) = values.items()
    assert (service.registry.names[index], value.error is not None) == (VOLUME, True)


async def test_served_values_are_kept_when_their_events_are_pruned(
    service: PausableService, group: ServiceGroup
) -> None:
    await service.send(served("ann"))
    await score(service)
    service.clock.step_to(NOW_MS + 170 * DAY_MS)  # events are kept for 180 days
    decision = await newest(service)
    features, _ = await history(service, decision)
    assert features == json.loads(json.dumps(dict(decision.features)))
    assert features[VOLUME] == 1
    release = await group.open(Registry([*REGISTRY, entry(name="new")]))
    with pytest.raises(InvalidInput) as refused:
        served_row(decision, "rows[3].decision_id", moments(release), release.registry.full_mask)
    (issue,) = refused.value.issues
    assert issue.path == "rows[3].decision_id"
    assert "beyond kept history" in issue.detail
