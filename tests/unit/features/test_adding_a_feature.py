"""Adding a feature is one entry and one line of the mirror, and no migration: shown with a categorical one."""

from __future__ import annotations

from datetime import timedelta
from random import Random
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.events.ports import Appended
from app.features.events import Action
from app.features.registry import Feature, Registry
from app.features.schema import Str, check_mirror
from app.profiles.online.compute import Computation
from app.stores.sql.registries import announce
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import SqliteSource, check_features, compile_registry
from app.telemetry import Metrics
from tests.support.clock import NOW_MS, FakeClock
from tests.support.events import admitted, feedback
from tests.support.features import ProfileFeatures
from tests.support.registry import REGISTRY

FAVOURITE = Feature(
    name="favourite_action_30d",
    dtype="str",
    ttl=timedelta(hours=1),
    window=timedelta(days=30),
    description="What the user did most often with a tip; of equals, the first in the alphabet.",
    compute="""
        SELECT user_id, action AS value
        FROM (
            SELECT user_id, action, ROW_NUMBER() OVER (PARTITION BY user_id ORDER BY COUNT(*) DESC, action) AS place
            FROM feedback
            GROUP BY user_id, action
        ) AS ranked
        WHERE place = 1
    """,
)


class Extended(ProfileFeatures, kw_only=True, frozen=True):
    favourite_action_30d: Annotated[
        Str | UnsetType,
        Meta(description="What the user did most often with a tip; of equals, the first in the alphabet."),
    ] = UNSET


EXTENDED = compile_registry(Registry([*REGISTRY, FAVOURITE]))


async def test_categorical_feature_needs_an_entry_and_a_mirror_line(
    database: SqliteDatabase, event_log: SqliteEventLog
) -> None:
    check_mirror(EXTENDED, Extended)
    await database.read(lambda connection: check_features(EXTENDED, connection))
    await announce(database, EXTENDED, NOW_MS)
    actions = (Action.COMPLETED, Action.SNOOZED, Action.SNOOZED, Action.DISMISSED, Action.DISMISSED)
    (stored,) = await event_log.append([[admitted(feedback("ann", NOW_MS - 1, action)) for action in actions]])
    computation = Computation(SqliteSource(database, EXTENDED), EXTENDED, FakeClock(), Metrics(), 2, Random(1))

    computed = await computation.live({"ann": EXTENDED.full_mask, "bob": EXTENDED.full_mask})

    def profile(user_id: str) -> Extended:
        values = computed[user_id]
        text = ",".join(f'"{EXTENDED[index].name}":{values[index].json.decode()}' for index in values)
        return msgspec.json.decode(f"{{{text}}}", type=Extended)

    assert profile("ann").favourite_action_30d == "dismissed"
    assert profile("ann").dismiss_rate_30d == 0.4
    assert profile("bob").favourite_action_30d is None
    assert profile("bob").tip_volume_30d == 0
    assert isinstance(stored, Appended)
    assert "favourite_action_30d" in stored.stale["ann"]
