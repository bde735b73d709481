"""The service in memory, for the tests of programs that use the client: no server, no network, no waiting.

The client sends its requests to a `FakeService`, which computes the features of the default registry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec import Struct

from profiles_client.calls import Traceparent, current_traceparent
from profiles_client.client import AsyncProfiles, Client, Profiles
from profiles_client.errors import ConnectionLost, Issue, Problem
from profiles_client.features import ProfileFeatures
from profiles_client.model import Event, F, Id, Moment, TipFeedback
from profiles_client.wire import Request, Response, Transport

T = TypeVar("T")
URL = "http://fake.invalid"
WINDOW = timedelta(days=30)
AHEAD = timedelta(minutes=5)
Compute = Callable[[Sequence[Event]], dict[str, Any]]


class _CandidateFeatures(Struct):
    is_overdue: bool
    task_age_days: float
    priority: float


class _Candidate(Struct):
    id: Id
    features: _CandidateFeatures


class _Context(Struct):
    at: Moment | None = None


class _ScoreRequest(Struct):
    user_id: Id
    candidates: list[_Candidate]
    request_id: Id
    context: _Context | None = None
    explore: bool = True


class _HistoryRow(Struct):
    user_id: Id | None = None
    as_of: Moment | None = None
    decision_id: Id | None = None


class _HistoryRequest(Struct):
    rows: list[_HistoryRow]
    known_at: str | None = None


class _BatchRequest(Struct):
    user_ids: list[Id]


class FakeDecision(NamedTuple):
    """A decision of a `FakeService`, for a test to inspect. Events may name its `id`."""

    id: str
    user_id: str
    chosen_id: str
    candidate_ids: tuple[str, ...]
    at: datetime
    features: object


class _Refused(Exception):
    def __init__(self, status: int, detail: str, path: str = "") -> None:
        super().__init__(detail)
        issues = (Issue(path, detail),) if path else ()
        self.response = Response(status, {}, msgspec.json.encode(Problem("", "", status, detail, issues)))


def default_features(events: Sequence[Event]) -> dict[str, Any]:
    """The features of the default registry, from a user's events within the window."""
    feedback = [event for event in events if isinstance(event, TipFeedback)]
    dwells = [event.dwell_ms for event in feedback if event.dwell_ms is not None]
    completed = [event.occurred_at for event in feedback if event.action == "completed"]
    hours, newest = Counter(at.hour for at in completed), {at.hour: at for at in sorted(completed)}
    actions = Counter(event.action for event in feedback)
    return {
        "completion_rate_30d": actions["completed"] / len(feedback) if feedback else None,
        "dismiss_rate_30d": actions["dismissed"] / len(feedback) if feedback else None,
        "mean_dwell_ms_30d": sum(dwells) / len(dwells) if dwells else None,
        "preferred_hour": max(hours, key=lambda hour: (hours[hour], newest[hour], -hour), default=None),
        "tip_volume_30d": len(events) - len(feedback),
    }


class FakeService:
    """A service in memory. `profiles` overrides features of users, which are otherwise computed from events.

    `events` and `decisions` are what it received. While `down` is true, every call fails as if no server were running;
    the client's pauses take no time. The first candidate is always chosen.
    """

    def __init__(
        self, compute: Compute = default_features, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.profiles: dict[str, Struct] = {}
        self.events: list[Event] = []
        self.decisions: dict[str, FakeDecision] = {}
        self.down = False
        self._compute = compute
        self._now = now
        self._arrived: dict[tuple[str, str], datetime] = {}
        self._asked: dict[tuple[str, str], str] = {}

    def answer(self, request: Request) -> Response:
        try:
            return Response(202 if request.target == "/events" else 200, {}, msgspec.json.encode(self._answer(request)))
        except _Refused as refused:
            return refused.response

    def _answer(self, request: Request) -> object:
        match request.method, request.target:
            case "POST", "/events":
                return self._store(_body(request, list[Event]))
            case "POST", "/score":
                return self._score(_body(request, _ScoreRequest))
            case "POST", "/profiles/history":
                asked = _body(request, _HistoryRequest)
                known_at = asked.known_at
                return {"rows": [self._row(row, f"rows[{i}]", known_at) for i, row in enumerate(asked.rows)]}
            case "POST", "/profiles/batch":
                users = _body(request, _BatchRequest).user_ids
                return {"profiles": [{"user_id": user, "features": self._features(user)} for user in users]}
            case "GET", target if target.startswith("/profiles/"):
                user = unquote(target.removeprefix("/profiles/"))
                return {"user_id": user, "features": self._features(user)}
        raise _Refused(404, "no route has this path")

    def _features(self, user: str, at: datetime | None = None, known_at: datetime | None = None) -> object:
        if user in self.profiles:
            return self.profiles[user]
        since, ever = (at or self._now()) - WINDOW, datetime.max.replace(tzinfo=UTC)
        return self._compute(
            [
                event
                for event in self.events
                if event.user_id == user
                and since < event.occurred_at <= (at or ever)
                and self._arrived[user, event.event_id] <= (known_at or ever)
            ]
        )

    def _store(self, events: list[Event]) -> object:
        known = {(event.user_id, event.event_id): event for event in self.events}
        new: list[Event] = []
        for index, event in enumerate(events):
            path = f"[{index}]"
            if event.occurred_at > self._now() + AHEAD:
                raise _Refused(422, "more than five minutes ahead of the server's clock", f"{path}.occurred_at")
            stored = known.setdefault((event.user_id, event.event_id), event)
            if stored != event:
                raise _Refused(409, "this event id is stored with other content", f"{path}.event_id")
            if stored is event:
                new.append(event)
        self.events += new
        self._arrived |= {(event.user_id, event.event_id): self._now() for event in new}
        return {"accepted": len(new), "duplicates": len(events) - len(new), "invalidated": True}

    def _score(self, asked: _ScoreRequest) -> object:
        ids = tuple(item.id for item in asked.candidates)
        if not 1 <= len(ids) <= 100 or len(set(ids)) < len(ids):
            raise _Refused(422, "must be 1 to 100 candidates with unique ids", "candidates")
        key = (asked.user_id, asked.request_id)
        if key not in self._asked:
            made = FakeDecision(
                f"decision-{len(self.decisions) + 1}",
                asked.user_id,
                ids[0],
                ids,
                self._now(),
                self._features(asked.user_id),
            )
            self._asked[key] = made.id
            self.decisions[made.id] = made
        decision = self.decisions[self._asked[key]]
        ranking = [{"id": item, "score": 0.0, "probability": 1 / len(ids)} for item in decision.candidate_ids]
        return {"decision_id": decision.id, "chosen_id": decision.chosen_id, "ranking": ranking}

    def _row(self, row: _HistoryRow, path: str, known_at: str | None) -> object:
        if row.decision_id is not None:
            decision = self.decisions.get(row.decision_id)
            if decision is None:
                raise _Refused(422, "no decision has this id", f"{path}.decision_id")
            return {"user_id": decision.user_id, "as_of": decision.at, "features": decision.features}
        if row.user_id is None or row.as_of is None:
            raise _Refused(422, "missing; a row has user_id and as_of, or decision_id", path)
        try:
            known = row.as_of if known_at == "as_of" else msgspec.convert(known_at, Moment | None)
        except msgspec.ValidationError as error:
            raise _Refused(422, str(error), "known_at") from error
        features = self._features(row.user_id, row.as_of, known)
        return {"user_id": row.user_id, "as_of": row.as_of, "features": features}


class _FakeTransport:
    """Sends requests to a `FakeService`. Its clock moves only when the client pauses."""

    def __init__(self, service: FakeService) -> None:
        self._service = service
        self._now = 0.0

    def now(self) -> float:
        return self._now

    async def pause(self, seconds: float) -> None:
        self._now += seconds

    async def exchange(self, request: Request, deadline: float) -> Response:
        if self._service.down:
            raise ConnectionLost("the fake service is down")
        return self._service.answer(request)

    async def close(self) -> None:
        return


class _Fake(Client[F]):
    def __init__(
        self,
        service: FakeService | None = None,
        *,
        contract: type[F] = ProfileFeatures,  # type: ignore[assignment]  # the default of F
        deadline_s: float = 1.0,
        traceparent: Traceparent = current_traceparent,
    ) -> None:
        super().__init__(URL, None, deadline_s, contract=contract, traceparent=traceparent)
        self.service = service or FakeService()

    def _transport(self) -> Transport:
        return _FakeTransport(self.service)


class FakeProfiles(_Fake[F], Profiles[F]):
    """`Profiles` for tests. The attribute `service` is the `FakeService` that answers its calls."""


class FakeAsyncProfiles(_Fake[F], AsyncProfiles[F]):
    """`AsyncProfiles` for tests. The attribute `service` is the `FakeService` that answers its calls."""


def _body(request: Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(request.body or b"", type=kind)
    except msgspec.ValidationError as error:
        detail, _, path = str(error).partition(" - at `$")
        raise _Refused(422, detail, path.rstrip("`").removeprefix(".") or "$") from error
