"""The two clients: `Profiles` for threads, `AsyncProfiles` for asyncio."""

from __future__ import annotations

import asyncio
import ssl
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, Generic, Never, Protocol, Self, cast, overload

from msgspec import UNSET, structs
from typing_extensions import TypeIs, TypeVar

from profiles_client.calls import (
    HISTORY_DEADLINE_S,
    RAISE,
    Calls,
    HistoryRows,
    KnownAt,
    Traceparent,
    check_id,
    current_traceparent,
    or_default,
    run,
)
from profiles_client.errors import ConnectionLost, ContractWarning, IncompleteHistory
from profiles_client.features import ProfileFeatures
from profiles_client.model import Action, Candidate, Choice, Event, F, Receipt, Row, Value
from profiles_client.transports import AsyncioTransport, BlockingTransport
from profiles_client.wire import Endpoint, Transport

D = TypeVar("D", default=Never)


class DataFrame(Protocol):
    """The part of a pandas DataFrame that the client uses."""

    @property
    def columns(self) -> Any: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    def assign(self, **columns: Any) -> Any: ...


Frame = TypeVar("Frame", bound=DataFrame)


class Client(Generic[F]):
    """The base of both clients: their options, and the check that a client is open."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        deadline_s: float = 1.0,
        *,
        contract: type[F] = ProfileFeatures,  # type: ignore[assignment]  # the default of F
        traceparent: Traceparent = current_traceparent,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """A client of the service at `url`, with the API key `key`.

        Every call returns or raises within `deadline_s` seconds, retries included. In threads, only the resolution of
        the host's name may take longer, because it cannot be interrupted.
        `contract` is the class that `profiles features --format python` writes for features of your own. `traceparent`
        is called for each request and returns the header of that name. The default passes on OpenTelemetry's span.
        """
        if not deadline_s > 0:
            raise ValueError(f"deadline_s: must be positive, not {deadline_s}")
        self._endpoint = Endpoint(url, key, tls)
        self._options = (contract, deadline_s, traceparent, Random())  # noqa: S311  # jitter is not secret
        self._opened: Calls[F] | None = None

    def _check_closed(self) -> None:
        if self._opened is not None:
            raise RuntimeError(f"{type(self).__name__} is open already: share it within its `with` block")

    @property
    def _calls(self) -> Calls[F]:
        if self._opened is None:
            raise RuntimeError(f"{type(self).__name__} is not open: use it in a `with` block")
        return self._opened


class Profiles(Client[F]):
    """A client for threads, which share its connections. Use it as a context manager.

    A call is retried after 429, 502, 503, 504, 507 and a lost connection, for as long as its deadline allows. Then it
    raises `Unavailable`, or returns `default`, if one is given.
    """

    def _transport(self) -> Transport:
        return BlockingTransport(self._endpoint)

    def __enter__(self) -> Self:
        self._check_closed()
        self._opened = Calls(self._transport(), *self._options)
        try:
            if problem := run(self._calls.contract_problem()):
                warnings.warn(problem, ContractWarning, stacklevel=2)
        except BaseException:  # such as the warning, if warnings are errors
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        run(self._calls.transport.close())
        self._opened = None

    def profile(self, user: str, *, default: D = RAISE, deadline_s: float | None = None) -> F | D:
        """The features of a user. An unknown user has the features of a user without events."""
        return run(or_default(self._calls.profile(user, deadline_s), default))

    def profiles(
        self, users: Iterable[str], *, default: D = RAISE, deadline_s: float | None = None
    ) -> dict[str, F] | D:
        """The features of users, by id. More than 1,000 are read in several requests."""
        return run(or_default(self._calls.profiles(users, deadline_s), default))

    def send(self, events: Event | Iterable[Event], *, deadline_s: float | None = None) -> Receipt:
        """Send events. Every later read reflects them. More than 1,000 are sent in several requests.

        After an error it is safe to send the same events again: the service recognizes an event by its id.
        """
        return run(self._calls.send(events, deadline_s))

    def decide(
        self,
        user: str,
        candidates: Iterable[Candidate],
        *,
        at: datetime | None = None,
        context: Mapping[str, Value] = {},
        explore: bool = True,
        default: D = RAISE,
        deadline_s: float | None = None,
    ) -> Decision | D:
        """Choose one of up to 100 tips for a user. `at` is when the tip is shown, with the user's UTC offset. `context`
        maps the names of further context features, which the service declares, to their values.

        If `explore` is false, the tip with the highest mean score is chosen.
        """
        make = partial(Decision, self)
        return run(or_default(self._calls.decide(make, user, candidates, at, context, explore, deadline_s), default))

    @overload
    def history(self, rows: Frame, *, known_at: KnownAt = None, deadline_s: float = HISTORY_DEADLINE_S) -> Frame: ...

    @overload
    def history(
        self, rows: HistoryRows, *, known_at: KnownAt = None, deadline_s: float = HISTORY_DEADLINE_S
    ) -> list[Row[F]]: ...

    def history(
        self, rows: HistoryRows | Frame, *, known_at: KnownAt = None, deadline_s: float = HISTORY_DEADLINE_S
    ) -> list[Row[F]] | Frame:
        """A training set: the features of each row as of its own moment, in the order of the rows.

        A row is a pair `(user_id, as_of)` or the id of a decision. A decision's row has the features that the decision
        was made from. A pandas DataFrame has a column `decision_id`, or `user_id` and `as_of`; it is returned with the
        features added. Events that arrived after `known_at` are ignored. `"as_of"` stands for the `as_of` of each row.
        """
        found, failed = run(self._calls.history(_rows_of(rows), known_at, deadline_s))
        return _history(rows, found, failed)


class AsyncProfiles(Client[F]):
    """`Profiles` for asyncio, with the same methods. Reads that begin in the same turn of the event loop share one
    request."""

    def _transport(self) -> Transport:
        return AsyncioTransport(self._endpoint)

    async def __aenter__(self) -> Self:
        self._check_closed()
        self._opened = Calls(self._transport(), *self._options)
        self._shared = dict[object, tuple[dict[str, None], asyncio.Task[dict[str, F]]]]()
        self._reading = set[asyncio.Task[dict[str, F]]]()
        try:
            if problem := await self._calls.contract_problem():
                warnings.warn(problem, ContractWarning, stacklevel=2)
        except BaseException:  # such as the warning, if warnings are errors
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        for reading in self._reading:
            reading.cancel()
        try:
            await asyncio.gather(*self._reading, return_exceptions=True)
        finally:
            await self._calls.transport.close()
            self._opened = None

    async def profile(self, user: str, *, default: D = RAISE, deadline_s: float | None = None) -> F | D:
        return await or_default(self._read(user, deadline_s), default)

    async def _read(self, user: str, deadline_s: float | None) -> F:
        check_id(user)  # before it joins others, whose request it would spoil
        # A request has one traceparent, so reads of several traces need several requests.
        kind = (deadline_s, self._calls.traceparent())
        if kind not in self._shared:
            # The task begins in the next turn of the loop. Until then, reads join it.
            task = asyncio.create_task(self._read_shared(kind))
            self._shared[kind] = ({}, task)
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
        users, reading = self._shared[kind]
        users[user] = None
        try:
            return (await asyncio.shield(reading))[user]
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if reading.cancelled() and caller is not None and not caller.cancelling():
                raise ConnectionLost("the client was closed before the answer") from None
            raise

    async def _read_shared(self, kind: tuple[float | None, str | None]) -> dict[str, F]:
        users, _ = self._shared.pop(kind)
        if len(users) == 1:
            (user,) = users
            return {user: await self._calls.profile(user, kind[0])}
        return await self._calls.profiles(users, kind[0])

    async def profiles(
        self, users: Iterable[str], *, default: D = RAISE, deadline_s: float | None = None
    ) -> dict[str, F] | D:
        return await or_default(self._calls.profiles(users, deadline_s), default)

    async def send(self, events: Event | Iterable[Event], *, deadline_s: float | None = None) -> Receipt:
        return await self._calls.send(events, deadline_s)

    async def decide(
        self,
        user: str,
        candidates: Iterable[Candidate],
        *,
        at: datetime | None = None,
        context: Mapping[str, Value] = {},
        explore: bool = True,
        default: D = RAISE,
        deadline_s: float | None = None,
    ) -> AsyncDecision | D:
        make = partial(AsyncDecision, self)
        return await or_default(self._calls.decide(make, user, candidates, at, context, explore, deadline_s), default)

    @overload
    async def history(
        self, rows: Frame, *, known_at: KnownAt = None, deadline_s: float = HISTORY_DEADLINE_S
    ) -> Frame: ...

    @overload
    async def history(
        self, rows: HistoryRows, *, known_at: KnownAt = None, deadline_s: float = HISTORY_DEADLINE_S
    ) -> list[Row[F]]: ...

    async def history(
        self, rows: HistoryRows | Frame, *, known_at: KnownAt = None, deadline_s: float = HISTORY_DEADLINE_S
    ) -> list[Row[F]] | Frame:
        found, failed = await self._calls.history(_rows_of(rows), known_at, deadline_s)
        return _history(rows, found, failed)


class Decision(Choice):
    """A decision. Report what becomes of its tip, so that the policy learns. A time that is left out is now, in the
    zone of the `at` that `decide` received, or else in UTC.

    Each method returns when the event is stored. A repeated call sends the same event again.
    """

    def __init__(self, client: Profiles[Any], *choice: Any) -> None:
        super().__init__(*choice)
        self._client = client

    def served(self, *, at: datetime | None = None) -> Receipt:
        """Report that the tip was shown."""
        return self._client.send(self.event(None, at))

    def completed(self, *, dwell_ms: int | None = None, at: datetime | None = None) -> Receipt:
        return self._react("completed", dwell_ms, at)

    def dismissed(self, *, dwell_ms: int | None = None, at: datetime | None = None) -> Receipt:
        return self._react("dismissed", dwell_ms, at)

    def snoozed(self, *, dwell_ms: int | None = None, at: datetime | None = None) -> Receipt:
        return self._react("snoozed", dwell_ms, at)

    def _react(self, action: Action, dwell_ms: int | None, at: datetime | None) -> Receipt:
        return self._client.send(self.event(action, at, dwell_ms))


class AsyncDecision(Choice):
    """`Decision` with coroutine methods, for `AsyncProfiles`."""

    def __init__(self, client: AsyncProfiles[Any], *choice: Any) -> None:
        super().__init__(*choice)
        self._client = client

    async def served(self, *, at: datetime | None = None) -> Receipt:
        return await self._client.send(self.event(None, at))

    async def completed(self, *, dwell_ms: int | None = None, at: datetime | None = None) -> Receipt:
        return await self._react("completed", dwell_ms, at)

    async def dismissed(self, *, dwell_ms: int | None = None, at: datetime | None = None) -> Receipt:
        return await self._react("dismissed", dwell_ms, at)

    async def snoozed(self, *, dwell_ms: int | None = None, at: datetime | None = None) -> Receipt:
        return await self._react("snoozed", dwell_ms, at)

    async def _react(self, action: Action, dwell_ms: int | None, at: datetime | None) -> Receipt:
        return await self._client.send(self.event(action, at, dwell_ms))


def _rows_of(rows: HistoryRows | DataFrame) -> HistoryRows:
    if not _is_frame(rows):
        return rows
    if "decision_id" in rows.columns:
        return list(rows["decision_id"])
    return zip(rows["user_id"], rows["as_of"], strict=True)


def _history(rows: HistoryRows | Frame, found: list[Row[F]], failed: dict[str, str]) -> list[Row[F]] | Frame:
    if failed:
        text = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        warnings.warn(f"some values could not be computed: {text}", IncompleteHistory, stacklevel=3)
    if not _is_frame(rows):
        return found
    features = [structs.asdict(row.features) for row in found]
    names = [name for name in (features[0] if features else ()) if features[0][name] is not UNSET]
    return cast(Frame, rows.assign(**{name: [values[name] for values in features] for name in names}))


def _is_frame(rows: HistoryRows | DataFrame) -> TypeIs[DataFrame]:
    return hasattr(rows, "assign")
