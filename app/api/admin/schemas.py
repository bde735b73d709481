"""Bodies of the admins' requests and answers, as typed structs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.api.schemas import MAX_USERS, FeatureNames, Value
from app.features.events import Action
from app.features.ids import Id


class UsersFound(msgspec.Struct):
    """User ids that begin with `prefix`, in the order of their UTF-8 bytes. `more`: further ids exist."""

    prefix: str
    user_ids: list[str]
    more: bool


class StoredEvent(msgspec.Struct):
    """A stored event and the state of its consumption."""

    seq: int
    received_at: str
    event: dict[str, Any]
    counted_at: Annotated[str, Meta(description="The event time that features use.")]
    time_corrected: Annotated[
        bool, Meta(description="The producer's time lay ahead of the service's clock; the time of arrival is used.")
    ]
    arrival_lag_ms: Annotated[int, Meta(description="From the producer's `occurred_at` to the arrival.")]
    invalidates: Annotated[list[str], Meta(description="The features that the event invalidated.")]
    state: Annotated[
        Literal["waiting", "consumed", "dead letter"],
        Meta(description="`waiting` since `received_at`: no worker has consumed it. Features count it in any state."),
    ]
    attempts: Annotated[int, Meta(description="How often consuming it has failed.")]
    dead_letter: Annotated[int | None, Meta(description="The id of its dead letter.")]


class HeldValue(msgspec.Struct):
    """A value in the cache that has not expired."""

    value: Value
    computed_at: str
    expires_at: str
    ttl_left_s: float
    seq: Annotated[int, Meta(description="The user's newest event that its computation saw.")]


class CellState(msgspec.Struct):
    """A feature of a user: the result of a read, the cached value, and the result of a computation."""

    value: Value
    dtype: Literal["float", "int", "str"]
    computed_at: str
    expires_at: str | None
    origin: Literal["cache", "computed"]
    freshness: Annotated[
        Literal["fresh", "stale", "missing"] | None,
        Meta(description="State of the cached value before this request; null if the cache does not answer."),
    ]
    invalidated_by: list[str]
    description: str
    state: Annotated[
        Literal["fresh", "stale", "missing", "degraded"],
        Meta(description="As `freshness`; `degraded` if reads compute because the cache is down or not trusted."),
    ]
    ttl_s: float
    holds: Annotated[
        Literal["value", "expired", "other definition", "lease", "nothing"] | None,
        Meta(description="Content of the key; `lease` while a reader computes the value."),
    ]
    held: Annotated[HeldValue | None, Meta(description="The value that the cache held before this request.")]
    recomputed: Annotated[Value, Meta(description="The result of a computation now.")]
    error: Annotated[str | None, Meta(description="Why it could not be computed, or who disabled it.")]
    difference: Annotated[
        Literal["none", "stale", "unexplained"] | None,
        Meta(
            description="Between `held` and `recomputed`. `stale`: an event arrived and the value was not deleted. "
            "`unexplained`: no event explains it; a rebuild corrects it."
        ),
    ]
    disabled: Annotated[bool, Meta(description="An admin has disabled the feature: it is served as null.")]


class UserView(msgspec.Struct):
    """A user: every feature, and the newest events."""

    user_id: str
    features: dict[str, CellState]
    events: list[StoredEvent]


KINDS = ("served", *(action.value for action in Action))
if TYPE_CHECKING:
    KindCounts = msgspec.Struct
else:  # the number of tips served, and of each kind of reaction
    KindCounts = msgspec.defstruct("KindCounts", [(kind, int, 0) for kind in KINDS])


class Day(KindCounts, kw_only=True):
    """A user's events in 24 hours, after `start` and up to `end`, counted by kind."""

    start: str
    end: str


class Hour(KindCounts, kw_only=True):
    """A user's events of the last 30 days in one hour of the local day, 0 to 23, counted by kind."""

    hour: int


class FeaturePoint(msgspec.Struct):
    """The value of a feature as of a moment."""

    at: str
    value: Value
    known: Annotated[bool, Meta(description="False if the window begins before the oldest kept event.")]


class UserDevelopment(msgspec.Struct):
    """The last 30 days of a user, in steps of 24 hours that end now, oldest first."""

    user_id: str
    at: str
    days: list[Day]
    hours: list[Hour]
    features: dict[str, list[FeaturePoint]]


class UserRebuildRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rebuild the features of one user; default: all features."""

    features: FeatureNames | None = None


class UserHoldings(msgspec.Struct):
    """The numbers of records that erasing a user deletes, by kind."""

    user_id: str
    views: int
    feedback: int
    dead_letters: int
    rebuilds: Annotated[int, Meta(description="Ended rebuilds that name the user; the name is removed from them.")]
    decisions: Annotated[int, Meta(description="Stored decisions of /score.")]
    learned: Annotated[int, Meta(description="Decisions from which the learned state was made; all of it is deleted.")]
    cached: Annotated[int | None, Meta(description="Live values in the cache; null if the cache does not answer.")]


class RebuildRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rebuild the features of every eligible user (`scope: all`), or of a list of users."""

    scope: Literal["all"] | None = None
    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS)] | None = None
    features: FeatureNames | None = None


class RebuildOfAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The first form of a `RebuildRequest`, for the OpenAPI document: every eligible user."""

    scope: Literal["all"]
    user_ids: None = None
    features: FeatureNames | None = None


class RebuildOfUsers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The second form of a `RebuildRequest`, for the OpenAPI document: a list of users."""

    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS)]
    scope: None = None
    features: FeatureNames | None = None


class RebuildStatus(msgspec.Struct):
    """A rebuild and its progress. `done` and `total` are numbers of users."""

    id: str
    scope: Annotated[str, Meta(description="`all`, or `users:` and a hash of the list.")]
    features: list[str]
    state: Literal["queued", "running", "completed", "cancelled", "failed"]
    done: int
    total: int
    rate_per_s: float | None
    eta_s: float | None
    requested_by: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None
    user_count: Annotated[int | None, Meta(description="Length of the list; null for every eligible user.")]
    took_s: Annotated[float | None, Meta(description="From start to end; null before the end.")]


class RebuildList(msgspec.Struct):
    """The newest rebuilds, newest first."""

    rebuilds: list[RebuildStatus]


class QualityRefresh(msgspec.Struct):
    """The progress of a data-quality measurement by a worker. `measured`: the number of users, once completed."""

    id: int
    state: Literal["queued", "running", "completed", "failed"]
    measured: int
    requested_by: str
    requested_at: str
    started_at: str | None
    finished_at: str | None
    error: str | None
    waiting_for: Annotated[
        Literal["queue", "worker"] | None,
        Meta(description="What prevents progress: the queue does not answer, or no worker is running."),
    ]


class UserBehind(msgspec.Struct):
    """A user whose value of the feature is in the requested state. Value and times are null if no value is cached."""

    user_id: str
    state: Literal["fresh", "missing", "stale"]
    value: Value
    computed_at: str | None
    expires_at: str | None


class UsersBehindList(msgspec.Struct):
    """The users whose value of `feature` is in the state `state` at the time `at`, in the order of their ids. A request
    scans a bounded number of users: continue with `after=next_after`, even if `users` is empty."""

    feature: str
    state: Literal["fresh", "missing", "stale", "null"]
    at: str
    users: Annotated[list[UserBehind] | None, Meta(description="Null if the cache does not answer.")]
    scanned: Annotated[int, Meta(description="The number of eligible users that were examined.")]
    next_after: str | None


class Letter(msgspec.Struct):
    """A dead letter: an event whose consumption failed repeatedly, or a queued payload that was rejected."""

    id: int
    source: Annotated[
        Literal["queue", "consumption"],
        Meta(description="`queue`: it was no valid event. `consumption`: an event that failed repeatedly."),
    ]
    payload: str
    error: str
    traceback: str
    attempts: int
    event_seq: int | None
    created_at: str
    last_failed_at: str


class LetterList(msgspec.Struct):
    """A page of dead letters by id; continue with `after=next_after`."""

    dead_letters: list[Letter]
    next_after: int | None


class Replayed(msgspec.Struct):
    """The result of replaying a dead letter."""

    accepted: int
    duplicates: int
    revived: Annotated[bool, Meta(description="The event was stored already; a worker will consume it again.")]


class LetterFailure(msgspec.Struct):
    """A dead letter that could not be replayed, and why."""

    id: int
    reason: str


class ReplayedAll(msgspec.Struct):
    """The result of replaying dead letters. If `next_after` is not null, there are more letters above that id."""

    replayed: Annotated[int, Meta(description="Letters that are deleted, because their events are stored.")]
    accepted: int
    duplicates: int
    revived: Annotated[int, Meta(description="Events that were stored already; a worker will consume them again.")]
    failed: int
    failures: list[LetterFailure]
    next_after: int | None


class AuditLine(msgspec.Struct):
    """An action of an admin and its outcome."""

    id: int
    at: str
    actor: str
    action: str
    subject: Annotated[str, Meta(description="A user appears as a hash only.")]
    state: Annotated[
        Literal["done", "refused", "failed", "begun"],
        Meta(description="`begun`: in progress, or its end could not be recorded."),
    ]
    outcome: str


class AuditPage(msgspec.Struct):
    """A page of the audit trail, newest first; continue with `before=next_before`."""

    entries: list[AuditLine]
    next_before: int | None
