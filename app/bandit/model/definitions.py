"""Declares what a request says about candidates and the context, and which inputs each spec makes of it.

To add an input, append a `Version`. It becomes the newest spec, and the policy with this spec the challenger. The schema
of `POST /score`, stored requests and the growth of statistics follow. Never change a version: users' statistics and
logged decisions were made with it.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Final

from msgspec import NODEFAULT, Meta

from app.bandit.model.declaration import FLAG, ONE, Feature, Version, log_share, soft_sign

_PRIORITY = Annotated[float, Meta(description="Higher matters more; any scale.", examples=[2])]
_OF_PROFILE = ("completion", "dismissal", "dwell", "volume", "hour_distance_cos", "hour_distance_sin")
_OF_CANDIDATE = ("is_overdue", "task_age", "priority")

VERSIONS: Final = (
    Version(
        candidate=[
            Feature("is_overdue", bool, {"is_overdue": FLAG}, NODEFAULT),
            Feature(
                "task_age_days",
                Annotated[float, Meta(ge=0, examples=[3.5])],
                {"task_age": log_share(365, "days")},
                NODEFAULT,
            ),
            Feature("priority", _PRIORITY, {"priority": soft_sign("p")}, NODEFAULT),
        ],
        inputs=[(ONE, ONE), *product([ONE], _OF_CANDIDATE), ("hour_cos", ONE), ("hour_sin", ONE)],
        precision=1.0,
        pooled=False,
    ),
    Version([("profile_present", ONE), *product(_OF_PROFILE, _OF_CANDIDATE)]),
)
