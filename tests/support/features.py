"""The features of the tests. They are fixed, so that the tests do not depend on the features of the service."""

from datetime import timedelta
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.features.registry import Feature, Registry
from app.features.schema import Float, Int

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

REGISTRY = Registry([COMPLETION_RATE, DISMISS_RATE, MEAN_DWELL, PREFERRED_HOUR, TIP_VOLUME])


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
