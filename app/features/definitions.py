"""The features this service serves. To add one: an entry here, a line in `schema.py`."""

from __future__ import annotations

from datetime import timedelta

from app.features.events import FEEDBACK, SERVED
from app.features.registry import Feature, Registry

COMPLETION_RATE = Feature(
    name="completion_rate_30d",
    dtype="float",
    ttl=timedelta(hours=1),
    description="Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1.",
    invalidated_by=(FEEDBACK,),
    compute="""
        SELECT user_id, AVG(action = 'completed') AS value
        FROM feedback
        WHERE occurred_at_ms > :now_ms - 30 * 86400000
        GROUP BY user_id
    """,
)

DISMISS_RATE = Feature(
    name="dismiss_rate_30d",
    dtype="float",
    ttl=timedelta(hours=1),
    description="Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1.",
    invalidated_by=(FEEDBACK,),
    compute="""
        SELECT user_id, AVG(action = 'dismissed') AS value
        FROM feedback
        WHERE occurred_at_ms > :now_ms - 30 * 86400000
        GROUP BY user_id
    """,
)

MEAN_DWELL = Feature(
    name="mean_dwell_ms_30d",
    dtype="float",
    ttl=timedelta(hours=1),
    description="Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known.",
    invalidated_by=(FEEDBACK,),
    compute="""
        SELECT user_id, AVG(dwell_ms) AS value
        FROM feedback
        WHERE occurred_at_ms > :now_ms - 30 * 86400000
        GROUP BY user_id
    """,
)

# A tie goes to the hour completed in last, then to the smaller hour.
PREFERRED_HOUR = Feature(
    name="preferred_hour",
    dtype="int",
    ttl=timedelta(hours=6),
    description="Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days.",
    invalidated_by=(FEEDBACK,),
    compute="""
        SELECT user_id, local_hour AS value
        FROM (
            SELECT user_id, local_hour, ROW_NUMBER() OVER (
                PARTITION BY user_id ORDER BY COUNT(*) DESC, MAX(occurred_at_ms) DESC, local_hour
            ) AS place
            FROM feedback
            WHERE action = 'completed' AND occurred_at_ms > :now_ms - 30 * 86400000
            GROUP BY user_id, local_hour
        )
        WHERE place = 1
    """,
)

TIP_VOLUME = Feature(
    name="tip_volume_30d",
    dtype="int",
    ttl=timedelta(hours=1),
    description="How many tips the user was served over the last 30 days.",
    invalidated_by=(SERVED,),
    default=0,
    compute="""
        SELECT user_id, COUNT(*) AS value
        FROM views
        WHERE occurred_at_ms > :now_ms - 30 * 86400000
        GROUP BY user_id
    """,
)

REGISTRY = Registry([COMPLETION_RATE, DISMISS_RATE, MEAN_DWELL, PREFERRED_HOUR, TIP_VOLUME])
