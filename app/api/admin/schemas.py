"""Bodies of the admins' requests and answers as typed structs."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from app.api.schemas import MAX_USERS, FeatureNames, Value
from app.features.ids import Id


class RebuildRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What to rebuild: everyone eligible (`scope`), or these users."""

    scope: Literal["all"] | None = None
    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS)] | None = None
    features: FeatureNames | None = None


class RebuildOfAll(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rebuild of everyone eligible, as the document shows it."""

    scope: Literal["all"]
    user_ids: None = None
    features: FeatureNames | None = None


class RebuildOfUsers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rebuild of these users, as the document shows it."""

    user_ids: Annotated[list[Id], Meta(min_length=1, max_length=MAX_USERS)]
    scope: None = None
    features: FeatureNames | None = None


class RebuildStatus(msgspec.Struct):
    """A rebuild and how far it is."""

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
    user_count: Annotated[int | None, Meta(description="Length of the list; null where everyone eligible is covered.")]
    took_s: Annotated[float | None, Meta(description="From its start to its end; null before that.")]


class RebuildList(msgspec.Struct):
    """Newest first."""

    rebuilds: list[RebuildStatus]


class QualityRefresh(msgspec.Struct):
    """A measurement by a worker, and how many users it has measured once it is completed."""

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
        Meta(description="What must be back before anything runs: the queue does not answer, or no worker is there."),
    ]


class UserBehind(msgspec.Struct):
    """A user of the state asked for; value and times are those of the cached value, where there is one."""

    user_id: str
    state: Literal["fresh", "missing", "stale"]
    value: Value
    computed_at: str | None
    expires_at: str | None


class UsersBehindList(msgspec.Struct):
    """By id, as of `at`; go on with `after=next_after`, even if this page is empty: it is bounded."""

    feature: str
    state: Literal["fresh", "missing", "stale", "null"]
    at: str
    users: Annotated[list[UserBehind] | None, Meta(description="Null while the cache is away.")]
    scanned: Annotated[int, Meta(description="How many eligible users were looked at.")]
    next_after: str | None


class Letter(msgspec.Struct):
    """A dead letter: what could not be consumed, and why."""

    id: int
    source: Annotated[
        Literal["queue", "consumption"],
        Meta(description="`queue`: it was no event. `consumption`: an event that failed again and again."),
    ]
    payload: str
    error: str
    traceback: str
    attempts: int
    event_seq: int | None
    created_at: str
    last_failed_at: str


class LetterList(msgspec.Struct):
    """By id; go on with `after`."""

    dead_letters: list[Letter]
    next_after: int | None


class Replayed(msgspec.Struct):
    """What replaying a dead letter did."""

    accepted: int
    duplicates: int
    revived: Annotated[bool, Meta(description="The event was stored already and is with the workers again.")]


class LetterFailure(msgspec.Struct):
    """A dead letter that stays, and why."""

    id: int
    reason: str


class ReplayedAll(msgspec.Struct):
    """What replaying dead letters did; where `next_after` is not null there are more, above that id."""

    replayed: Annotated[int, Meta(description="Letters that are gone: their events are stored.")]
    accepted: int
    duplicates: int
    revived: Annotated[int, Meta(description="Events that were stored already and are with the workers again.")]
    failed: int
    failures: list[LetterFailure]
    next_after: int | None


class AuditLine(msgspec.Struct):
    """Who did what to whom, when, and what came of it."""

    id: int
    at: str
    actor: str
    action: str
    subject: Annotated[str, Meta(description="A user only as a hash.")]
    state: Annotated[
        Literal["done", "refused", "failed", "begun"],
        Meta(description="`begun`: under way, or its end could not be written down."),
    ]
    outcome: str


class AuditPage(msgspec.Struct):
    """Newest first; go on with `before`."""

    entries: list[AuditLine]
    next_before: int | None
