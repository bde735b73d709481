"""Bodies of requests and answers as typed structs: what OpenAPI shows and what requests are checked against."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.features.ids import Id

MAX_USERS = 1_000
MAX_NAMES = 1_000
MAX_MOMENTS = 10_000
Moment = Annotated[
    datetime, Meta(tz=True, description="RFC 3339 with UTC offset.", examples=["2026-04-25T08:30:00+02:00"])
]
# An int is a number, too: named beside float it would match both branches of the schema's `oneOf`.
Value = float | str | None
# Each name that is none has a refusal of its own: a body full of them would be a hundred times as large in memory.
FeatureNames = Annotated[
    list[str], Meta(min_length=1, max_length=MAX_NAMES, description="Feature names; all where it is not given.")
]


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Users whose profiles to read, repeats included."""

    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS, examples=[["ada", "grace"]])]
    features: FeatureNames | None = None


class HistoryRequestRow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A user at a moment."""

    user_id: Id
    as_of: Moment


class HistoryRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A training set: one row per example, each at its own moment."""

    rows: Annotated[list[HistoryRequestRow], Meta(min_length=1, max_length=MAX_MOMENTS)]
    features: FeatureNames | None = None
    known_at: (
        Annotated[
            str,
            Meta(
                description="Leave out events that arrived after this time (RFC 3339); "
                "`as_of`: after each row's own moment.",
                examples=["as_of"],
                extra_json_schema={"anyOf": [{"const": "as_of"}, {"format": "date-time"}]},
            ),
        ]
        | None
    ) = None


class EventsReceipt(msgspec.Struct):
    """What became of the events. They are durable; reads reflect them from now on."""

    accepted: Annotated[int, Meta(description="New events.", examples=[1])]
    duplicates: Annotated[int, Meta(description="Events known before, with the same content.", examples=[0])]
    invalidated: Annotated[
        bool,
        Meta(description="True: the cached values are gone. False: that is owed, and reads compute until it is done."),
    ]


class FeatureDetail(msgspec.Struct):
    """A value with its freshness."""

    value: Value
    dtype: Literal["float", "int", "str"]
    computed_at: str
    expires_at: Annotated[str | None, Meta(description="Null where the value is not cached.")]
    origin: Literal["cache", "computed"]
    error: Annotated[str | UnsetType, Meta(description="Why the default stands here, where computing failed.")] = UNSET


class FeatureEntry(msgspec.Struct):
    """An entry of the registry, without its SQL."""

    name: str
    dtype: Literal["float", "int", "str"]
    ttl_s: float
    window_s: Annotated[float, Meta(description="How far back it looks; older events do not count.")]
    default: Annotated[int | float | str | None, Meta(description="The value if nothing is known, of the dtype.")]
    description: str
    invalidated_by: list[str]
    relations: Annotated[list[str], Meta(description="What its SQL reads: views, feedback, or both.")]
    fingerprint: Annotated[str, Meta(description="Changes with the SQL, the dtype, the default or the window.")]
    us_per_user: Annotated[
        float | None,
        Meta(description="Microseconds to compute it for a user, as this process measured at its start; null if not."),
    ]
    state: Annotated[
        Literal["ok", "failing", "disabled"],
        Meta(description="`failing`, in this process, or `disabled` by an admin: what is not cached is null."),
    ]
    reason: Annotated[str | None, Meta(description="Why it is failing or disabled.")]


class FeatureList(msgspec.Struct):
    """The registry."""

    features: list[FeatureEntry]


class Health(msgspec.Struct):
    """Alive."""

    status: Literal["alive"]


class Readiness(msgspec.Struct):
    """`ready`; `degraded`: reads are right, but something is away; `unavailable`: it cannot serve; `stopping`: it was
    told to stop, and still serves requests."""

    status: Literal["ready", "degraded", "unavailable", "stopping"]
    checks: dict[str, str]
