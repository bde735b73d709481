"""What callers send and receive, besides the features themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from typing import Annotated, Generic, Literal
from uuid import uuid4

from msgspec import Meta, Struct, field
from typing_extensions import TypeVar

from profiles_client.features import ProfileFeatures

F = TypeVar("F", bound=Struct, default=ProfileFeatures)
Action = Literal["completed", "dismissed", "snoozed"]
ID_PATTERN = r"^(?!\.{1,2}\Z)[^/\x00-\x1f\x7f-\x9f]+\Z"  # `$` would allow a newline at the end
Id = Annotated[str, Meta(min_length=1, max_length=128, pattern=ID_PATTERN)]
Value = bool | float | str | None
Moment = Annotated[datetime, Meta(tz=True)]


def new_id() -> str:
    return uuid4().hex


class TipServed(Struct, frozen=True, kw_only=True, tag_field="subject", tag="signals.tip.served"):
    """A tip was shown to a user. `occurred_at` needs the user's UTC offset, which gives the local hour."""

    user_id: Id
    tip_id: Id
    occurred_at: Moment
    decision_id: Id | None = None
    event_id: Id = field(default_factory=new_id)


class TipFeedback(Struct, frozen=True, kw_only=True, tag_field="subject", tag="signals.tip.feedback"):
    """A user reacted to a tip. `dwell_ms`: how long the tip was on screen."""

    user_id: Id
    tip_id: Id
    occurred_at: Moment
    action: Action
    dwell_ms: Annotated[int, Meta(ge=0, le=86_400_000)] | None = None
    decision_id: Id | None = None
    event_id: Id = field(default_factory=new_id)


Event = TipServed | TipFeedback


class Receipt(Struct, frozen=True):
    """What became of sent events. They are durable, and every later read reflects them. `duplicates` were stored
    before. `invalidated` is False if the cache did not answer; reads are correct all the same."""

    accepted: int
    duplicates: int
    invalidated: bool


class Candidate(Struct, frozen=True):
    """A tip that may be shown. A higher `priority` matters more; any scale. `others` are further features that the
    service declares, by name."""

    id: Id
    is_overdue: bool
    task_age_days: Annotated[float, Meta(ge=0)]
    priority: float
    others: Mapping[str, Value] = {}


class Ranked(Struct, frozen=True):
    """A candidate with its expected reward, and the probability with which the policy chooses it."""

    id: str
    score: float
    probability: float


class Row(Struct, Generic[F], frozen=True):
    """A row of a training set: the features of a user as of a moment."""

    user_id: str
    as_of: datetime
    features: F


class Choice:
    """The facts of a decision, and the events about its tip. The ranking is by score; the chosen candidate is not
    always the first."""

    def __init__(self, id_: str, user_id: str, chosen_id: str, ranking: Sequence[Ranked], zone: tzinfo | None) -> None:
        self.id = id_
        self.user_id = user_id
        self.chosen_id = chosen_id
        self.ranking = tuple(ranking)
        self._zone = zone or UTC
        self._events: dict[str, Event] = {}

    def event(self, action: Action | None, at: datetime | None, dwell_ms: int | None = None) -> Event:
        """The event that the tip was served (`action` is None), or that the user reacted. A second call with the same
        action returns the same event, so that sending it again is harmless."""
        made = self._events.get(action or "served")
        if made is None:
            about = {"user_id": self.user_id, "tip_id": self.chosen_id, "decision_id": self.id}
            when = at or datetime.now(self._zone)
            if action is None:
                made = TipServed(occurred_at=when, **about)
            else:
                made = TipFeedback(occurred_at=when, action=action, dwell_ms=dwell_ms, **about)
            self._events[action or "served"] = made
        return made
