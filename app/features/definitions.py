"""The features that the service serves by default. A new one needs an entry here and a field in `schema.py`.

The SQL runs on SQLite and PostgreSQL with equal results.
"""

from datetime import timedelta

from app.features.examples import Example, feedback, served
from app.features.registry import Feature, Registry

DAY, MONTH = timedelta(days=1), timedelta(days=30)

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
    examples=[
        Example(events=[feedback("completed"), feedback("dismissed"), feedback("snoozed")], value=1 / 3),
        Example(events=[feedback("completed", ago=MONTH), feedback("dismissed")], value=0.0),
    ],
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
    examples=[
        Example(events=[feedback("dismissed"), feedback("completed")], value=0.5),
        Example(events=[served()], value=None),
    ],
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
    examples=[
        Example(
            events=[feedback("completed", dwell_ms=1_000), feedback("snoozed", dwell_ms=2_000), feedback("dismissed")],
            value=1_500.0,
        ),
        Example(events=[feedback("completed")], value=None),
    ],
)

# Ties: the hour of the latest completion, then the smaller hour.
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
    examples=[
        Example(
            events=[
                feedback("completed", local_hour=9, ago=2 * DAY),
                feedback("completed", local_hour=9, ago=3 * DAY),
                feedback("completed", local_hour=22, ago=DAY),
            ],
            value=9,
        ),
        Example(
            events=[feedback("completed", local_hour=9, ago=2 * DAY), feedback("completed", local_hour=22, ago=DAY)],
            value=22,
        ),
    ],
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
    examples=[
        Example(events=[served(), served(ago=timedelta(days=29)), served(ago=MONTH)], value=2),
        Example(events=[feedback("completed")], value=0),
    ],
)

REGISTRY = Registry([COMPLETION_RATE, DISMISS_RATE, MEAN_DWELL, PREFERRED_HOUR, TIP_VOLUME])
