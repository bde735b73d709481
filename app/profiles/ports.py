"""What the online path needs from outside, as small protocols with their value types. `app.stores` implements them.

A *cell* is one feature of one user. A *token* is the exact bytes that a cell's key held when a computation set out;
a fill lands only while the key still holds them. All methods of `Cache` raise `CacheUnavailable` when the server does
not answer in time and `CacheRefused` when it refuses the command; those of the SQLite ports raise `StoreUnavailable`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

Epoch = str
END_OF_TIME_MS = (1 << 63) - 1


class Cell(NamedTuple):
    """One feature of one user."""

    user_id: str
    feature: str


# Cells of one user: the id, and the features' names as bytes, ready to stand in a key.
Row = tuple[str, Sequence[bytes]]


class Fill(NamedTuple):
    """A value on its way into the cache: lands only where the cell still holds `token`."""

    cell: Cell
    token: bytes
    value: bytes
    ttl_ms: int


class Cache(Protocol):
    """One key per cell, under the epoch of the connection that carries the command."""

    @property
    def available(self) -> bool:
        """Whether it is worth asking: False while the circuit breaker is open."""
        ...

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        """What each cell holds, and the epoch under which that was read."""
        ...

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """The same for all cells of rows, row after row."""
        ...

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """Per cell: the bytes it holds now, which are a fresh lease of ours where it held nothing."""
        ...

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Compare-and-set each; False where refused."""
        ...

    async def drop(self, cells: Collection[Cell]) -> None:
        """Delete unconditionally. Returns only when the server has done so."""
        ...

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        """Delete each cell that still holds exactly those bytes; how many did."""
        ...

    async def drop_user(self, user_id: str) -> None:
        """Delete a user's keys under every epoch. Scans the whole key space."""
        ...

    async def check(self) -> None:
        """Try every command of the protocol on a key of its own."""
        ...


class ComputeRow(NamedTuple):
    """One row of a computation: a user, a mask of features, and the moment.

    `now_ms` None means a live read: the source's own now. `known_ms` bounds arrival where it is not None.
    """

    user_id: str
    mask: int
    now_ms: int | None = None
    known_ms: int | None = None


class Snapshot(NamedTuple):
    """What one statement saw: the newest sequence number, and per asked row one raw value per feature.

    `errors` names the (row, feature index) pairs whose SQL failed; their raw value is None. `overdue` is the mask of
    the features that took too long.
    """

    seq: int
    rows: Sequence[Sequence[object]]
    errors: dict[tuple[int, int], str]
    overdue: int = 0


class Source(Protocol):
    """Computes features where the facts live."""

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """Every asked row in one snapshot."""
        ...

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        """How many past moments, from the first on, one `compute` takes in some tens of milliseconds; at least one."""
        ...

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """The same, in nothing's way: for features that may take long."""
        ...


class Owed(NamedTuple):
    """One invalidation that could not be made."""

    id: int
    user_id: str


class OwedInvalidations(Protocol):
    """The table of invalidations that could not be made."""

    def any_owed(self) -> bool:
        """Look now, on the caller's thread; costs microseconds."""
        ...

    async def owe(self, user_ids: Collection[str], now_ms: int) -> None:
        """Record; committed when this returns."""
        ...

    async def pending(self, limit: int) -> tuple[list[Owed], frozenset[str]]:
        """The oldest rows, and every feature name that any process of this database caches."""
        ...

    async def settled(self, ids: Sequence[int]) -> None:
        """Forget rows whose invalidation has been made."""
        ...


class EventTail(Protocol):
    """What was committed to the event log lately, by whatever process. Both calls look now, on the caller's thread."""

    def look(self) -> frozenset[str] | None:
        """The users of the events committed since the last look; None where everything must be forgotten."""
        ...

    def newest(self, user_id: str) -> Mapping[str, int] | None:
        """Subject to the sequence number of the user's newest event, where there is one.

        None while the cache is owed an invalidation of this user: what it holds is no proof of anything.
        """
        ...


class NewestEvents(Protocol):
    """What the log says of users' newest events."""

    async def newest(self, user_ids: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """(user, subject) to the sequence number of the newest event."""
        ...

    async def eligible(self, after: str, since_ms: int, limit: int, until_ms: int = END_OF_TIME_MS) -> list[str]:
        """User ids above `after`, ascending, with any event from `since_ms` to `until_ms`."""
        ...

    async def count_eligible(self, since_ms: int) -> int:
        """How many there are in all."""
        ...

    async def oldest_event_ms(self) -> int | None:
        """Event time of the oldest event that is kept."""
        ...


class RecentEvent(NamedTuple):
    """An event lately committed: its sequence number, its user, and when it arrived."""

    seq: int
    user_id: str
    received_at_ms: int


class RecentEvents(Protocol):
    """What an audit asks of the log. Raises `StoreUnavailable`."""

    async def since(self, seq: int, limit: int) -> list[RecentEvent]:
        """The newest events above a sequence number, newest first."""
        ...

    async def newest_seq(self) -> int:
        """The highest sequence number; 0 where there is no event."""
        ...

    async def any_unconsumed(self, user_id: str, after_seq: int) -> bool:
        """Whether some event of the user above a sequence number has not been consumed yet."""
        ...
