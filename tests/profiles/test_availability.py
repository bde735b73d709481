"""Which features are computed and reported: one that an admin has disabled is neither tried nor a trouble."""

from __future__ import annotations

import json

from app.profiles.availability import FIRST_PAUSE_S, FeatureAvailability
from tests.support.clock import FakeClock
from tests.support.registry import REGISTRY


def test_a_disabled_feature_is_no_trouble_and_not_tried_until_it_is_enabled() -> None:
    clock, switches = FakeClock(), ["[]"]
    availability = FeatureAvailability(REGISTRY, clock, lambda: switches[0])
    for index in (0, 1):
        availability.overdue(index, "ann", "it takes too long")
    clock.advance(int(FIRST_PAUSE_S * 1000))
    switches[0] = json.dumps([[REGISTRY.names[0], "ada", "too slow", 0]])
    assert [item.feature for item in availability.troubles()] == [REGISTRY.names[1]]
    assert (availability.due(), availability.due()) == ((1, "ann"), None)
    switches[0] = "[]"
    assert [item.feature for item in availability.troubles()] == list(REGISTRY.names[:2])
    assert availability.due() == (0, "ann")
