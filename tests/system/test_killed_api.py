"""kill -9 of the API in the middle of ingest: what was acknowledged is there once, what was not can be sent again."""

from __future__ import annotations

import pytest

from tests.support.fleet import Fleet
from tests.support.killing import Ingest

KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_every_acknowledged_event_is_there_once_when_the_api_is_killed_in_the_middle_of_ingest(
    fleet: Fleet,
) -> None:
    (first,) = await fleet.apis(1)
    ingest = Ingest(fleet, first, kills=KILLS)
    await ingest.run()
    assert ingest.faults == []
    assert ingest.killed == KILLS
    assert ingest.unanswered >= KILLS, "the kills came between requests"
    assert set(ingest.acknowledged.values()) == {1}
