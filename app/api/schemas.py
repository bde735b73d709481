"""Bodies of requests and responses: requests are decoded into these structs, and OpenAPI describes them."""

from datetime import datetime
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.features.ids import Id
from app.features.registry import DTYPES
from app.features.schema import ProfileFeatures

MAX_USERS = 1_000
FEATURE_NAME = {"$ref": "#/components/schemas/FeatureName"}
Moment = Annotated[
    datetime, Meta(tz=True, description="RFC 3339 with a UTC offset.", examples=["2026-04-25T08:30:00+02:00"])
]
# Without `int`: in the schema's `oneOf` an integer would match the branch of `float`, too.
Value = float | str | None
ROWS = [{"user_id": "ada", "as_of": "2026-04-25T08:30:00+02:00"}]
KNOWN_AT = {"anyOf": [{"const": "as_of"}, {"type": "string", "format": "date-time"}]}
# Limited, because each unknown name gets an issue of its own, which takes a hundred times as much memory as the name.
FeatureNames = Annotated[
    list[Annotated[str, Meta(extra_json_schema=FEATURE_NAME)]],
    Meta(min_length=1, max_length=1_000, description="Feature names. Default: all features."),
]


class BatchRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for the profiles of many users. Ids may repeat."""

    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS, examples=[["ada", "grace"]])]
    features: FeatureNames | None = None


class HistoryRequestRow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A row of a training set. `user_id` and `as_of` request the user's features as of that time; `decision_id`
    requests the features that the decision was made from."""

    user_id: Id | UnsetType = UNSET
    as_of: Moment | UnsetType = UNSET
    decision_id: Id | UnsetType = UNSET


# The two forms of a `HistoryRequestRow`, for the OpenAPI document.
class HistoryMoment(msgspec.Struct, forbid_unknown_fields=True):
    """A row of a training set that asks for the features of a user as of a point in time."""

    user_id: Id
    as_of: Moment


class HistoryDecision(msgspec.Struct, forbid_unknown_fields=True):
    """A row of a training set that asks for the features that a decision was made from."""

    decision_id: Id


class HistoryRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for a training set. Each row asks for the features of a user at a moment, or for those that a decision
    was made from. Features at a moment ignore events that arrived after `known_at`. If `known_at` is `as_of`, they
    ignore events that arrived after the row's own moment. Without `known_at`, they include events that arrived late."""

    rows: Annotated[list[HistoryRequestRow], Meta(min_length=1, max_length=10_000, examples=[ROWS])]
    features: FeatureNames | None = None
    known_at: Annotated[str, Meta(examples=["as_of"], extra_json_schema=KNOWN_AT)] | None = None


class EventsReceipt(msgspec.Struct):
    """The receipt for stored events. They are durable, and every later read reflects them."""

    accepted: Annotated[int, Meta(description="Number of new events.", examples=[1])]
    duplicates: Annotated[int, Meta(description="Number of events already stored with the same content.", examples=[0])]
    invalidated: Annotated[
        bool, Meta(description="False: the cache did not answer; reads compute until its stale values are deleted.")
    ]


class ProfileAnswer(msgspec.Struct):
    """The features of a user."""

    user_id: str
    features: ProfileFeatures


class BatchAnswer(msgspec.Struct):
    """The profiles of many users, in the order of the request."""

    profiles: list[ProfileAnswer]


class HistoryRow(msgspec.Struct):
    """The features of a user at a moment. For a decision, `as_of` is when its profile was read."""

    user_id: str
    as_of: str
    features: ProfileFeatures


class HistoryAnswer(msgspec.Struct):
    """The rows of a training set, in the order of the request."""

    rows: list[HistoryRow]
    failed: Annotated[
        dict[str, str] | UnsetType,
        Meta(description="The reason by feature name, if a feature is disabled or could not be computed for a row."),
    ] = UNSET


class FeatureDetail(msgspec.Struct):
    """The value of a feature, when it was computed, and how long it is valid."""

    value: Value
    dtype: Literal["float", "int", "str"]
    computed_at: str
    expires_at: Annotated[str | None, Meta(description="Null if the value is not cached.")]
    origin: Annotated[
        Literal["cache", "computed", "unproven"],
        Meta(description="`unproven`: from the cache while the database did not answer; see `Cache-Control`."),
    ]
    error: Annotated[
        str | UnsetType, Meta(description="Why the feature could not be computed; `value` is null then.")
    ] = UNSET


# `FloatDetail`, `IntDetail` and `StrDetail`: the details of features of one dtype, for the OpenAPI document.
DETAILS: dict[str, type[msgspec.Struct]] = {
    dtype: msgspec.defstruct(
        f"{dtype.capitalize()}Detail",
        [("value", kind | None), ("dtype", cast(Any, Literal)[dtype])],
        bases=(FeatureDetail,),
    )
    for dtype, kind in DTYPES.items()
}


# `app.api.openapi` adds a field for each feature of the registry.
class ProfileDetails(msgspec.Struct):
    """For each feature, its value, its times and its origin."""


class DetailedProfileAnswer(msgspec.Struct):
    """The features of a user, each with its times and origin."""

    user_id: str
    features: ProfileDetails


class FeatureEntry(msgspec.Struct):
    """A feature as the registry declares it, without its SQL, and its cost and state in the process that answers."""

    name: str
    dtype: Literal["float", "int", "str"]
    ttl_s: float
    window_s: Annotated[float, Meta(description="Only events of the last `window_s` seconds count.")]
    default: Annotated[int | float | str | None, Meta(description="The value of a user without events in the window.")]
    description: str
    invalidated_by: list[str]
    relations: Annotated[list[str], Meta(description="The relations that its SQL reads: `views`, `feedback` or both.")]
    fingerprint: Annotated[str, Meta(description="A hash of SQL, dtype, default and window.")]
    us_per_user: Annotated[
        float | None,
        Meta(description="Microseconds to compute it for one user, measured when this process started; null if not."),
    ]
    state: Annotated[
        Literal["ok", "failing", "disabled"],
        Meta(description="`failing`: this process cannot compute it; null unless cached. `disabled` by an admin."),
    ]
    reason: Annotated[str | None, Meta(description="Why it is failing or disabled.")]


class FeatureList(msgspec.Struct):
    """All features, in the order of the registry."""

    features: list[FeatureEntry]


class Health(msgspec.Struct):
    """The answer of a process that is alive."""

    status: Literal["alive"]


class Readiness(msgspec.Struct):
    """Whether reads can be served, and the result of each check.

    `degraded`: reads are correct, but a dependency does not answer. `unavailable`: reads cannot be served. `stopping`:
    the process is shutting down and still serves requests.
    """

    status: Literal["ready", "degraded", "unavailable", "stopping"]
    checks: dict[str, str]
