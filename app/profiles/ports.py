"""What profiles need from the stores, as protocols with their value types. `app.stores` implements them.

A *cell* is one feature of one user. A *token* is the exact bytes that a cell held before a computation began; a fill
lands only while the cell still holds them. The methods of `Cache` raise `CacheUnavailable` if the server does not
answer in time and `CacheRefused` if it refuses the command. The methods of the other ports raise `StoreUnavailable`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

Epoch = str
END_OF_TIME_MS = (1 << 63) - 1


class Cell(NamedTuple):
    user_id: str
    feature: str


# Several cells of one user: the id, and the names of the features as bytes.
Row = tuple[str, Sequence[bytes]]


class Fill(NamedTuple):
    """A value to be stored if the cell still holds `token`."""

    cell: Cell
    token: bytes
    value: bytes
    ttl_ms: int


class Cache(Protocol):
    """One key per cell, under the epoch of the connection that carries the command."""

    @property
    def available(self) -> bool:
        """False while the circuit breaker is open."""
        ...

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        """The contents of each cell, and the epoch under which they were read."""
        ...

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """As `read`, for the cells of all rows, row after row."""
        ...

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """Put a fresh lease into each empty cell; returns what each cell holds now."""
        ...

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Compare-and-set each; False if refused."""
        ...

    async def drop(self, cells: Collection[Cell]) -> None:
        """Delete unconditionally. Returns only when the server has confirmed it."""
        ...

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        """Delete each cell that still holds exactly these bytes; returns how many did."""
        ...

    async def drop_user(self, user_id: str) -> None:
        """Delete a user's keys under every epoch. Scans the whole key space."""
        ...

    async def check(self) -> None:
        """Try every command of the protocol on a key of its own."""
        ...


class ComputeRow(NamedTuple):
    """One row of a computation: a user, a mask of features, and a moment.

    `now_ms` None means a live read, at the clock of the computation. `known_ms`, if given, leaves out events that
    arrived later.
    """

    user_id: str
    mask: int
    now_ms: int | None = None
    known_ms: int | None = None


class Snapshot(NamedTuple):
    """The result of one statement: the newest sequence number it saw, and for each row one raw value per feature.

    `errors` has the (row, feature index) pairs whose SQL failed; their raw value is None. `overdue` is the mask of the
    features that exceeded the deadline.
    """

    seq: int
    rows: Sequence[Sequence[object]]
    errors: dict[tuple[int, int], str]
    overdue: int = 0


class Source(Protocol):
    """Computes features in the database."""

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """Compute every row in one snapshot."""
        ...

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        """How many of the first rows one `compute` can do in some tens of milliseconds; at least one."""
        ...

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """As `compute`, on a connection of its own, for features that may take long."""
        ...


class OwedInvalidation(NamedTuple):
    id: int
    user_id: str


class OwedInvalidations(Protocol):
    """The table of invalidations that the cache did not take."""

    def any_owed(self) -> bool:
        """Ask the database on the caller's thread, which takes microseconds."""
        ...

    async def owe(self, user_ids: Collection[str], now_ms: int) -> None:
        """Record one for each user; committed when this returns."""
        ...

    async def pending(self, limit: int) -> tuple[list[OwedInvalidation], frozenset[str]]:
        """The oldest rows, and the names of all features that any process of this database caches."""
        ...

    async def settled(self, ids: Sequence[int]) -> None:
        """Delete rows whose invalidation has been made."""
        ...


class ChangeFeed(Protocol):
    """New events of the event log, whichever process wrote them. Both methods query on the caller's thread."""

    def changed_users(self) -> frozenset[str] | None:
        """Users of the events committed since the last call; None if every local copy must be dropped."""
        ...

    def newest(self, user_id: str) -> Mapping[str, int] | None:
        """The sequence number of the user's newest event, by subject.

        None while an invalidation of this user is owed: then nothing proves that a cached value is current.
        """
        ...


class NewestEvents(Protocol):
    """Queries of the event log for users and their newest events."""

    async def newest(self, user_ids: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """The sequence number of the newest event, by user and subject."""
        ...

    async def eligible(self, after: str, since_ms: int, limit: int, until_ms: int = END_OF_TIME_MS) -> list[str]:
        """User ids above `after`, ascending, with any event from `since_ms` to `until_ms`."""
        ...

    async def count_eligible(self, since_ms: int) -> int: ...

    async def oldest_event_ms(self) -> int | None:
        """Event time of the oldest event that is kept."""
        ...


class RecentEvent(NamedTuple):
    seq: int
    user_id: str
    received_at_ms: int


class RecentEvents(Protocol):
    """Queries of the event log for the consistency checks."""

    async def since(self, seq: int, limit: int) -> list[RecentEvent]:
        """Events above a sequence number, newest first."""
        ...

    async def newest_seq(self) -> int:
        """The highest sequence number; 0 if there is no event."""
        ...

    async def any_unconsumed(self, user_id: str, after_seq: int) -> bool:
        """Whether any event of the user above a sequence number has not been consumed yet."""
        ...
