"""The calls to the service, written once for both clients: requests, retries, answers.

`run` executes a call whose transport blocks. Its coroutine never suspends, so no event loop is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from itertools import count, islice
from math import isnan
from random import Random
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Struct

from profiles_client.errors import (
    BY_STATUS,
    ConnectionLost,
    DeadlineExceeded,
    Invalid,
    Issue,
    Problem,
    ProfilesError,
    Rejected,
    Unavailable,
)
from profiles_client.model import ID_PATTERN, Candidate, Event, F, Ranked, Receipt, Row, Value, new_id
from profiles_client.wire import Request, Response, Transport

T = TypeVar("T")
D = TypeVar("D")
MAX_USERS = 1_000
MAX_EVENTS = 1_000
MAX_ROWS = 10_000
RETRIED = frozenset({429, 502, 503, 504, 507})  # a proxy answers 502 and 504 for a lost connection
BACKOFF_S, MAX_BACKOFF_S = 0.02, 1.0
HISTORY_DEADLINE_S = 60.0
ROUTES = frozenset({"batch", "history"})  # `GET /profiles/batch` does not read the user called `batch`
RAISE: Any = object()  # the default of `default=`
_valid_id = re.compile(ID_PATTERN).match
_surrogate = re.compile("[\ud800-\udfff]").search
_index = re.compile(r"\[(\d+)\]")
_phrases = {item.value: item.phrase for item in HTTPStatus}
_plain = re.compile(r"[A-Za-z0-9_\-.~@:]+").fullmatch

Traceparent = Callable[[], str | None]
KnownAt = datetime | Literal["as_of"] | None
HistoryRows = Iterable[tuple[str, datetime] | str]


class _Profile(Struct, Generic[F]):
    user_id: str
    features: F


class _Batch(Struct, Generic[F]):
    profiles: list[_Profile[F]]


class _History(Struct, Generic[F]):
    rows: list[Row[F]]
    failed: dict[str, str] = {}


class _Score(Struct):
    decision_id: str
    chosen_id: str
    ranking: list[Ranked]


class _Feature(Struct):
    name: str
    fingerprint: str


class _Features(Struct):
    features: list[_Feature]


_RECEIPT = msgspec.json.Decoder(Receipt)
_SCORE = msgspec.json.Decoder(_Score)
_FEATURES = msgspec.json.Decoder(_Features)


class Calls(Generic[F]):
    """The calls of both clients, sent through `transport`. `contract` is the Struct of the features."""

    def __init__(
        self, transport: Transport, contract: type[F], deadline_s: float, traceparent: Traceparent, random: Random
    ) -> None:
        self.transport = transport
        self.deadline_s = deadline_s
        self.traceparent = traceparent
        self._random = random
        self._contract = contract
        self._profile: msgspec.json.Decoder[_Profile[F]] = msgspec.json.Decoder(_Profile[contract])  # type: ignore[valid-type]
        self._batch: msgspec.json.Decoder[_Batch[F]] = msgspec.json.Decoder(_Batch[contract])  # type: ignore[valid-type]
        self._history: msgspec.json.Decoder[_History[F]] = msgspec.json.Decoder(_History[contract])  # type: ignore[valid-type]

    async def profile(self, user: str, deadline_s: float | None) -> F:
        check_id(user)
        if user in ROUTES:
            return (await self.profiles([user], deadline_s))[user]
        target = f"/profiles/{user if _plain(user) else quote(user, safe='')}"
        return _decoded(self._profile, await self._ask("GET", target, None, self._deadline(deadline_s))).features

    async def profiles(self, users: Iterable[str], deadline_s: float | None) -> dict[str, F]:
        deadline, found, unique = self._deadline(deadline_s), dict[str, F](), dict[str, None]()
        _check_list(users, "user_ids")
        for index, user in enumerate(users):
            check_id(user, f"user_ids[{index}]")
            unique[user] = None
        for _, chunk in _chunks(unique, MAX_USERS):
            answer = await self._ask("POST", "/profiles/batch", _encoded({"user_ids": chunk}), deadline)
            found |= {item.user_id: item.features for item in _decoded(self._batch, answer).profiles}
        return found

    async def send(self, events: Event | Iterable[Event], deadline_s: float | None) -> Receipt:
        deadline, total = self._deadline(deadline_s), Receipt(0, 0, invalidated=True)
        for start, chunk in _chunks([events] if isinstance(events, Event) else events, MAX_EVENTS):
            receipt = _decoded(_RECEIPT, await self._ask("POST", "/events", _encoded(chunk), deadline, start))
            total = Receipt(
                total.accepted + receipt.accepted,
                total.duplicates + receipt.duplicates,
                total.invalidated and receipt.invalidated,
            )
        return total

    async def decide(
        self,
        make: Callable[[str, str, str, list[Ranked], tzinfo | None], T],
        user: str,
        candidates: Iterable[Candidate],
        at: datetime | None,
        context: Mapping[str, Value],
        explore: bool,
        deadline_s: float | None,
    ) -> T:
        """Let the service choose a candidate. Return the result of `make`, called with the fields of a `Choice`."""
        zone = at.tzinfo if at is not None else None  # fails before the decision is made if `at` is no datetime
        body: dict[str, object] = {"user_id": user, "request_id": new_id(), "explore": explore}
        body["candidates"] = [
            {
                "id": item.id,
                "features": {
                    "is_overdue": item.is_overdue,
                    "task_age_days": item.task_age_days,
                    "priority": item.priority,
                    **item.others,
                },
            }
            for item in candidates
        ]
        if at is not None or context:
            body["context"] = {**context, **({} if at is None else {"at": at})}
        score = _decoded(_SCORE, await self._ask("POST", "/score", _encoded(body), self._deadline(deadline_s)))
        return make(score.decision_id, user, score.chosen_id, score.ranking, zone)

    async def history(
        self, rows: HistoryRows, known_at: KnownAt, deadline_s: float
    ) -> tuple[list[Row[F]], dict[str, str]]:
        """The rows of a training set and, for each feature that could not be computed, the reason."""
        deadline, found, failed = self._deadline(deadline_s), list[Row[F]](), dict[str, str]()
        _check_list(rows, "rows")
        for start, chunk in _chunks(rows, MAX_ROWS):
            asked = [_row(row, f"rows[{index}]") for index, row in enumerate(chunk, start)]
            body: dict[str, object] = {"rows": asked}
            if known_at is not None:
                body["known_at"] = known_at if isinstance(known_at, str) else known_at.isoformat()
            answer = await self._ask("POST", "/profiles/history", _encoded(body), deadline, start)
            decoded = _decoded(self._history, answer)
            found += decoded.rows
            failed |= decoded.failed
        return found, failed

    async def contract_problem(self) -> str | None:
        """How the service's features differ from the contract. None if they are equal, or if they cannot be read."""
        ours: dict[str, str] = getattr(self._contract, "FINGERPRINTS", {})
        if not ours:
            return None
        try:
            answer = _decoded(_FEATURES, await self._once(Request("GET", "/features"), self._deadline(None)))
        except ProfilesError:
            return None
        theirs = {item.name: item.fingerprint for item in answer.features}
        differences = [
            f"{name} is {'missing' if name not in theirs else 'new' if name not in ours else 'defined differently'}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if not differences:
            return None
        return f"the service has other features than {self._contract.__qualname__}: {', '.join(differences)}"

    async def _ask(self, method: str, target: str, body: bytes | None, deadline: float, start: int = 0) -> bytes:
        """Send a request; repeat it until the deadline if the error may be temporary. Raises the last error. `start` is
        the index of the body's first item in the caller's list."""
        request, failure = Request(method, target, body, self.traceparent()), None
        for attempt in count():
            try:
                return await self._once(request, deadline, start)
            except DeadlineExceeded as error:
                if failure is None:
                    raise
                raise DeadlineExceeded(f"{error}; the attempt before: {failure}") from failure
            except Unavailable as error:
                failure = error
                lost = isinstance(error, ConnectionLost)
                if not lost and (error.problem is None or error.problem.status not in RETRIED):
                    raise
                asked_s = error.retry_after_s or 0.0
                spread_s = max(min(BACKOFF_S * 2 ** min(attempt, 10), MAX_BACKOFF_S), asked_s / 2)
                pause_s = asked_s + self._random.random() * spread_s
                if self.transport.now() + pause_s >= deadline:
                    raise
            await self.transport.pause(pause_s)
        raise AssertionError("unreachable")

    async def _once(self, request: Request, deadline: float, start: int = 0) -> bytes:
        answer = await self.transport.exchange(request, deadline)
        if answer.status < 300:
            return answer.body
        raise error_of(answer, start)

    def _deadline(self, deadline_s: float | None) -> float:
        seconds = self.deadline_s if deadline_s is None else deadline_s
        if isnan(seconds):
            raise ValueError("deadline_s: must be a number of seconds, not NaN")
        return self.transport.now() + seconds


def run(call: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        call.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a blocking call suspended")


async def or_default(call: Coroutine[Any, Any, T], default: D) -> T | D:
    """The result of `call`. If the call raises `Unavailable` and a `default` is given, the result is the default."""
    try:
        return await call
    except Unavailable:
        if default is RAISE:
            raise
        return default


def current_traceparent() -> str | None:
    """OpenTelemetry's current span, as the value of a `traceparent` header. None if there is no current span."""
    trace = sys.modules.get("opentelemetry.trace")
    span = trace.get_current_span().get_span_context() if trace is not None else None
    if span is None or not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}"


def check_id(user: object, path: str = "user_id") -> None:
    """Raises `Invalid`, naming `path`, if `user` is no valid id. An id with `/` or `..` would change the URL."""
    if isinstance(user, str) and len(user) <= 128 and _valid_id(user) and not _surrogate(user):
        return
    detail = "must be a string of 1 to 128 characters without control characters or `/`, and not `.` or `..`"
    raise _invalid("Invalid id", path, detail)


def _check_list(items: object, path: str) -> None:
    """Raises `Invalid` if `items` is a single string: each of its characters would be read as an id."""
    if isinstance(items, str):
        raise _invalid("Invalid ids", path, "must be a list, not a string")


def _row(row: object, path: str) -> dict[str, object]:
    match row:
        case str():
            return {"decision_id": row}
        case user, as_of:  # a frame that was read from a file may have a string
            return {"user_id": user, "as_of": as_of.isoformat() if isinstance(as_of, datetime) else as_of}
    raise _invalid("Invalid row", path, "must be (user_id, as_of) or the id of a decision")


def _invalid(title: str, path: str, detail: str) -> Invalid:
    issue = Issue(path, detail)
    return Invalid(f"{path} {detail}", problem=Problem(title=title, status=422, detail=detail, errors=(issue,)))


def error_of(answer: Response, start: int = 0) -> ProfilesError:
    """The error for a response that is not 2xx. The body of the response is a problem (RFC 9457), or anything if a
    proxy sent it. `start` is added to the first index in each issue's path: with 1000, `[3]` becomes `[1003]`."""
    status = answer.status
    try:
        problem = msgspec.json.decode(answer.body, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = Problem(title=_phrases.get(status, ""), detail=_excerpt(answer.body))
    if 300 <= status < 400:
        place = answer.headers.get(b"location", b"another address").decode("latin-1")
        problem = Problem(title="Redirect", detail=f"to {place}; give the client the URL of the service itself")
    issues = tuple(
        Issue(_index.sub(lambda found: f"[{int(found[1]) + start}]", issue.path, count=1), issue.detail)
        for issue in problem.errors
    )
    problem = msgspec.structs.replace(problem, status=status, errors=issues)
    faults = "".join(f"; {issue.path}: {issue.detail}" for issue in problem.errors)
    request_id = answer.headers.get(b"x-request-id", b"").decode("latin-1") or None
    kind = BY_STATUS.get(status, Unavailable if status >= 500 else Rejected)
    return kind(
        f"{status} {problem.title}: {problem.detail or 'no details'}{faults}",
        problem=problem,
        request_id=request_id,
        retry_after_s=_retry_after_s(answer.headers.get(b"retry-after", b"").decode("latin-1")),
    )


def _retry_after_s(value: str) -> float | None:
    """The seconds to wait, from a Retry-After header with a number or a date; None if it is neither."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def _decoded(decoder: msgspec.json.Decoder[T], answer: bytes) -> T:
    try:
        return decoder.decode(answer)
    except msgspec.ValidationError as error:
        raise ProfilesError(f"the answer does not fit the contract: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfilesError(f"the answer is not JSON: {_excerpt(answer) or 'it is empty'}") from error


def _excerpt(body: bytes) -> str:
    return body[:200].decode("utf-8", "replace")


def _encoded(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise Invalid(f"a text of the request is not valid Unicode: {error}") from error


def _chunks(items: Iterable[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Lists of at most `size` items, each with the index of its first item."""
    rest, start = iter(items), 0
    while chunk := list(islice(rest, size)):
        yield start, chunk
        start += len(chunk)
