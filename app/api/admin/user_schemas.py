"""Bodies of the admins' requests and answers about one user, as typed structs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.schemas import FeatureNames, Value
from app.features.events import Action


class StoredEvent(msgspec.Struct):
    """An event as it is stored, and what came of it."""

    seq: int
    received_at: str
    event: dict[str, Any]
    counted_at: Annotated[str, Meta(description="The event time that counts.")]
    time_corrected: Annotated[
        bool, Meta(description="The producer's time lay ahead of the service's clock; the time of arrival counts.")
    ]
    arrival_lag_ms: Annotated[int, Meta(description="From `occurred_at`, as the producer has it, to its arrival.")]
    invalidates: Annotated[list[str], Meta(description="The features that the event made untrue.")]
    state: Annotated[
        Literal["waiting", "consumed", "dead letter"],
        Meta(description="`waiting`: no worker has consumed it yet. The features count it all the same."),
    ]
    consumed_at: str | None
    attempts: Annotated[int, Meta(description="How often consuming it failed by itself.")]
    dead_letter: Annotated[int | None, Meta(description="The id of its dead letter.")]


class HeldValue(msgspec.Struct):
    """A live value in the cache."""

    value: Value
    computed_at: str
    expires_at: str
    ttl_left_s: float
    seq: Annotated[int, Meta(description="The newest event that its computation saw.")]


class CellState(msgspec.Struct):
    """A feature of a user: what a read gives, what the cache really held, and what a computation gives."""

    value: Value
    dtype: Literal["float", "int", "str"]
    computed_at: str
    expires_at: str | None
    origin: Literal["cache", "computed"]
    freshness: Annotated[
        Literal["fresh", "stale", "missing"] | None,
        Meta(description="What the cache held before this look; null while it is away."),
    ]
    invalidated_by: list[str]
    description: str
    state: Annotated[
        Literal["fresh", "stale", "missing", "degraded"],
        Meta(description="As `freshness`; `degraded` where reads compute, for the cache is away or not trusted."),
    ]
    ttl_s: float
    holds: Annotated[
        Literal["value", "other definition", "lease", "nothing"] | None,
        Meta(description="What stands in the key: `lease` while a reader computes the value."),
    ]
    held: Annotated[HeldValue | None, Meta(description="The value that the cache held before this look.")]
    recomputed: Annotated[Value, Meta(description="What a computation gives now.")]
    error: Annotated[str | None, Meta(description="Why nothing could be computed, or by whom it is disabled.")]
    difference: Annotated[
        Literal["none", "stale", "time", "unexplained"] | None,
        Meta(
            description="Of `held` from `recomputed`. `stale`: an event came and the value was not dropped. `time`: "
            "the window moved on over the same events. `unexplained`: neither; a rebuild puts it right."
        ),
    ]
    disabled: Annotated[bool, Meta(description="An admin has disabled the feature: it is null, whatever is held.")]


class UserView(msgspec.Struct):
    """A user as an admin sees it."""

    user_id: str
    features: dict[str, CellState]
    events: list[StoredEvent]


KINDS = ("served", *(action.value for action in Action))
if TYPE_CHECKING:
    KindCounts = msgspec.Struct
else:  # how many tips were served, and how many of each reaction came back
    KindCounts = msgspec.defstruct("KindCounts", [(kind, int, 0) for kind in KINDS])


class Day(KindCounts, kw_only=True):
    """24 hours, after `start` and up to `end`."""

    start: str
    end: str


class Hour(KindCounts, kw_only=True):
    """A local hour of the user's day, 0 to 23."""

    hour: int


class FeaturePoint(msgspec.Struct):
    """A feature at a moment."""

    at: str
    value: Value
    known: Annotated[bool, Meta(description="False where the window reaches back beyond kept history.")]


class UserDevelopment(msgspec.Struct):
    """The last 30 days of a user, in steps of 24 hours that end now, oldest first."""

    user_id: str
    at: str
    days: list[Day]
    hours: list[Hour]
    features: dict[str, list[FeaturePoint]]


class UserRebuildRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which features to rebuild; all where it is not given."""

    features: FeatureNames | None = None


class UserHoldings(msgspec.Struct):
    """What erasing a user deletes."""

    user_id: str
    views: int
    feedback: int
    dead_letters: int
    rebuilds: Annotated[int, Meta(description="Ended rebuilds that name the user; they forget the name.")]
    decisions: Annotated[int, Meta(description="Decisions of /score that are kept.")]
    learned: Annotated[int, Meta(description="Decisions that the learned state was made of; it goes as a whole.")]
    cached: Annotated[int | None, Meta(description="Live values in the cache; null while it is away.")]
