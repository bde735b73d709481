"""A valid registry entry, for tests that change it in one place."""

from datetime import timedelta
from typing import Any

from app.features.events import FEEDBACK, SERVED
from app.features.registry import Feature

COUNT_VIEWS = "SELECT user_id, COUNT(*) AS value FROM views GROUP BY user_id"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT user_id, i AS value FROM views, n"


def entry(**changes: Any) -> Feature:
    """An `int` feature named `probe`, with fields replaced."""
    fields: dict[str, Any] = {
        "name": "probe",
        "dtype": "int",
        "ttl": timedelta(hours=1),
        "window": timedelta(days=30),
        "description": "A feature of the tests.",
        "invalidated_by": (SERVED, FEEDBACK),
        "compute": COUNT_VIEWS,
    }
    return Feature(**{**fields, **changes})
