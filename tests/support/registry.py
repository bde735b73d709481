"""The registry of the tests. It is fixed, so that the tests do not depend on the features of the service.

`FEATURES` is its name for `PROFILES_FEATURES`, and `REGISTRY` is compiled.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.features.registry import Feature, Registry
from app.features.schema import Float, Int
from app.stores.sqlite.feature_check import compile_registry

MONTH = timedelta(days=30)

COMPLETION_RATE = Feature(
    name="completion_rate_30d",
    dtype="float",
    ttl=timedelta(hours=1),
    window=MONTH,
    description="Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1.",
    compute="""
        SELECT user_id, COUNT(*) FILTER (WHERE action = 'completed') / CAST(COUNT(*) AS DOUBLE PRECISION) AS value
        FROM feedback
        GROUP BY user_id
    """,
)

DISMISS_RATE = Feature(
    name="dismiss_rate_30d",
    dtype="float",
    ttl=timedelta(hours=1),
    window=MONTH,
    description="Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1.",
    compute="""
        SELECT user_id, COUNT(*) FILTER (WHERE action = 'dismissed') / CAST(COUNT(*) AS DOUBLE PRECISION) AS value
        FROM feedback
        GROUP BY user_id
    """,
)

MEAN_DWELL = Feature(
    name="mean_dwell_ms_30d",
    dtype="float",
    ttl=timedelta(hours=1),
    window=MONTH,
    description="Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known.",
    compute="""
        SELECT user_id, AVG(CAST(dwell_ms AS DOUBLE PRECISION)) AS value
        FROM feedback
        GROUP BY user_id
    """,
)

# A tie goes to the hour completed in last, then to the smaller hour.
PREFERRED_HOUR = Feature(
    name="preferred_hour",
    dtype="int",
    ttl=timedelta(hours=6),
    window=MONTH,
    description="Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days.",
    compute="""
        SELECT user_id, local_hour AS value
        FROM (
            SELECT user_id, local_hour, ROW_NUMBER() OVER (
                PARTITION BY user_id ORDER BY COUNT(*) DESC, MAX(occurred_at_ms) DESC, local_hour
            ) AS place
            FROM feedback
            WHERE action = 'completed'
            GROUP BY user_id, local_hour
        ) AS ranked
        WHERE place = 1
    """,
)

TIP_VOLUME = Feature(
    name="tip_volume_30d",
    dtype="int",
    ttl=timedelta(hours=1),
    window=MONTH,
    description="How many tips the user was served over the last 30 days.",
    default=0,
    compute="""
        SELECT user_id, COUNT(*) AS value
        FROM views
        GROUP BY user_id
    """,
)

REGISTRY = compile_registry(Registry([COMPLETION_RATE, DISMISS_RATE, MEAN_DWELL, PREFERRED_HOUR, TIP_VOLUME]))


class ProfileFeatures(msgspec.Struct, kw_only=True, frozen=True):
    """A user's features: declared behaviour over the last 30 days; null if it is unknown."""

    completion_rate_30d: Annotated[
        Float | UnsetType,
        Meta(description="Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1."),
    ] = UNSET
    dismiss_rate_30d: Annotated[
        Float | UnsetType,
        Meta(description="Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1."),
    ] = UNSET
    mean_dwell_ms_30d: Annotated[
        Float | UnsetType,
        Meta(
            description="Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known."
        ),
    ] = UNSET
    preferred_hour: Annotated[
        Int | UnsetType,
        Meta(
            description="Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days."
        ),
    ] = UNSET
    tip_volume_30d: Annotated[
        Int | UnsetType, Meta(description="How many tips the user was served over the last 30 days.")
    ] = UNSET


FEATURES = f"{Path(__file__)}:REGISTRY"

MODULE = """
from datetime import timedelta
from app.features.examples import Example, feedback, served
from app.features.registry import Feature, Registry

REGISTRY = Registry([{entries}])
"""
ENTRY = """
    Feature(
        name={name!r}, dtype={dtype!r}, ttl=timedelta(hours=1), window=timedelta(days={days}),
        description="A feature of the tests.", compute={compute!r}, {more}
    ),"""
COUNT_VIEWS = "SELECT user_id, COUNT(*) AS value FROM views GROUP BY user_id"


def own_entry(
    name: str = "probe", compute: str = COUNT_VIEWS, dtype: str = "int", days: int = 30, more: str = ""
) -> str:
    """The code of an entry. `more` is the code of further arguments."""
    return ENTRY.format(name=name, compute=compute, dtype=dtype, days=days, more=more)


def own_registry(path: Path, *entries: str) -> str:
    """Write a module with a registry of these entries; its name for `PROFILES_FEATURES`."""
    path.write_text(MODULE.format(entries="".join(entries)))
    return f"{path}:REGISTRY"
