"""Protocols and value types of the stores that profiles need; `app.stores` implements the protocols.

A *cell* is one feature of one user, and has one key in the cache. A *token* is the exact bytes that a cell held before
a computation began: a value, or a *lease*, a random marker in an otherwise empty cell. A computed value is stored (a
*fill*) only while the cell still holds the token. The methods of `Cache` raise `CacheUnavailable` if the server does
not answer in time and `CacheRefused` if it refuses the command. The methods of the other ports raise
`StoreUnavailable`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from app.features.registry import ProfileRead, Scalar

Epoch = str
EVERY_SLOT = -1  # in a set of hash slots
# In place of the content of a cell whose server does not answer. No cell holds it, so it is neither a hit nor the token
# of a fill that could succeed.
UNAVAILABLE = b"\0unavailable"
END_OF_TIME_MS = (1 << 63) - 1
COUNTED = 100_000  # more users than this are not counted


class Cell(NamedTuple):
    user_id: str
    feature: str


# Several cells of one user: the id, and the names of the features as bytes.
Row = tuple[str, Sequence[bytes]]
# The contents of cells by user id and feature index; None for an empty cell.
Held = dict[str, dict[int, bytes | None]]


class Fill(NamedTuple):
    """A value to be stored in a cell if the cell still holds the bytes `token`."""

    cell: Cell
    token: bytes
    value: bytes
    ttl_ms: int


class Cache(Protocol):
    """The shared cache on Redis or Valkey. Each key begins with an *epoch*, which changes if the server or the database
    is replaced, so that keys from before the change are not read. If only some nodes of a cluster answer, the cells of
    the others read as `UNAVAILABLE`, and fills store nothing in them."""

    @property
    def available(self) -> bool:
        """False while the circuit breaker is open, after the server did not answer."""

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        """The epoch of the keys, and the contents of the cells; None for an empty cell."""

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """The same as `read` for the cells of all rows, as one list."""

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """Put a new lease, a random marker, into each empty cell; return the contents of each cell afterwards."""

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """Store each value if its cell still holds the `token` of its fill; return whether each was stored."""

    async def drop(self, cells: Collection[Cell]) -> None:
        """Delete the keys of cells, whatever they hold. Returns only when every server has confirmed it. If only some
        servers confirm, the error has the hash `slots` of the users whose keys may be left."""

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        """Delete each cell that still holds exactly the given bytes; return how many were deleted."""

    async def drop_user(self, user_id: str) -> None:
        """Delete a user's keys under every epoch. Scans the whole key space."""

    async def check(self) -> None:
        """Try every command of the cache protocol on a test key; raise an error if a command fails."""


class ComputeRow(NamedTuple):
    """One row of a computation: a user, a bit mask of features, and a moment.

    Events after the moment `now_ms` are left out. None means now, a *live* computation, which leaves out no event.
    Events that arrived after `known_ms` are left out, too. With a `version`, the row repeats a live computation of the
    moment `now_ms`: it uses the user's events with a sequence number up to `version`, whatever their time.
    """

    user_id: str
    mask: int
    now_ms: int | None = None
    known_ms: int | None = None
    version: int | None = None


class Snapshot(NamedTuple):
    """The result of a computation. `rows`, `versions` and `leaves_ms` have one item for each `ComputeRow`.

    `rows`: one raw value per feature.
    `versions`: the sequence number of the user's newest event in the snapshot, or minus the number of erasures so far
    if the user has no event. Zeros if every `ComputeRow` has a `now_ms` and none has a `version`.
    `leaves_ms`: for each feature, the moment at which the oldest event leaves the window, so that the value may change;
    `END_OF_TIME_MS` if the window is empty. It is set only if every `ComputeRow` is live.
    `errors`: a text for each value whose SQL failed, by (row, feature index); the value is None.
    `overdue`: the mask of slow features.
    """

    rows: Sequence[Sequence[object]]
    versions: Sequence[int]
    leaves_ms: Sequence[Sequence[int]]
    errors: dict[tuple[int, int], str]
    overdue: int = 0


class Source(Protocol):
    """Computes features in the database."""

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """Compute all rows in one snapshot of the database. Rows without a `now_ms` are computed as of `clock_ms`."""

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        """The number of rows, from the first on, that one `compute` can do in some tens of milliseconds; at least 1."""

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """Compute all rows in one snapshot, on a separate connection, so that slow features delay no read."""


class State(NamedTuple):
    """The part of the database that every process observes, because another process may change it at any time.

    `owed`: the hash slots of users with an owed invalidation. `server`: the identity of the server that is registered
    as the cache; for a cluster, see `app.stores.valkey.registration`. `generation`: the number of this registration.
    `disabled`: JSON of `app.profiles.availability.Disabled` rows. `database_id` is part of every cache key.
    """

    owed: frozenset[int] = frozenset((EVERY_SLOT,))
    server: str | None = None
    generation: int = 0
    disabled: str = "[]"
    database_id: str = ""

    def has_keys_of(self, other: State) -> bool:
        """Whether values have the same keys in the cache under both states."""
        return (self.server, self.generation, self.database_id) == (other.server, other.generation, other.database_id)


class ObservedState(Protocol):
    last: State  # by the last query

    def look(self) -> State | None:
        """Query the state on the caller's thread, if the database answers in microseconds; else return None."""

    async def query(self) -> State:
        """Query the state; the result is not older than the call."""


class OwedInvalidation(NamedTuple):
    """A record that the cache keys of a user must still be deleted. `slot` is the user's hash slot, or `EVERY_SLOT` if
    a process of an older release made the record."""

    id: int
    user_id: str
    slot: int


class OwedInvalidations(Protocol):
    """The table of users whose cache keys must still be deleted, because the cache did not answer."""

    async def any_owed(self) -> bool: ...

    async def owe(self, user_ids: Collection[str], now_ms: int) -> None:
        """Record that these users' keys must still be deleted. The record is committed when this returns."""

    async def pending(self, limit: int, without: Collection[int] = ()) -> tuple[list[OwedInvalidation], frozenset[str]]:
        """Up to `limit` of the oldest records, except those of the hash slots `without`; and the names of all features
        that any process of this database caches, whose keys must be deleted."""

    async def settled(self, ids: Sequence[int]) -> None:
        """Delete records by id, after the keys of their users have been deleted."""


class ChangeFeed(Protocol):
    """Tells which users have new events, stored by any process. Both methods query on the caller's thread."""

    def changed_users(self) -> frozenset[str] | None:
        """Users of the events committed since the last call; None if the local cache must be cleared."""

    def newest(self, user_id: str) -> Mapping[str, int] | None:
        """The sequence number of the user's newest event of each subject (kind of event). None while an invalidation is
        owed: then nothing proves that a cached value is current."""


class RecentEvent(NamedTuple):
    seq: int
    user_id: str
    received_at_ms: int


class UserQueries(Protocol):
    async def newest(self, user_ids: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """The sequence number of each user's newest event of each subject, by (user id, subject)."""

    async def recent(self, after_seq: int, limit: int) -> list[RecentEvent]:
        """Up to `limit` events of any user with a sequence number above `after_seq`, newest first."""

    async def any_unconsumed(self, user_id: str, after_seq: int) -> bool:
        """Whether any event of the user with a sequence number above `after_seq` is still unconsumed."""

    async def eligible(self, after: str, since_ms: int, limit: int, until_ms: int = END_OF_TIME_MS) -> list[str]:
        """Up to `limit` ids above `after` of users with an event between `since_ms` and `until_ms`, ascending."""

    async def count_eligible(self, since_ms: int) -> int:
        """The number of users with an event since `since_ms`, but at most `COUNTED`."""

    async def oldest_event_ms(self) -> int | None:
        """The time of the oldest stored event; None if there is none."""


class LoggedProfile(NamedTuple):
    """The profile of a stored decision. `number` orders decisions by the time of storing. `origin` is `service` if the
    service read the profile. `read` is None for any other origin, and for decisions of old releases."""

    number: int
    decision_id: str
    user_id: str
    origin: str
    features: Mapping[str, Scalar]
    read: ProfileRead | None


class LoggedProfiles(Protocol):
    """The profiles that are stored with decisions. Those of damaged decisions are left out."""

    async def newest(self, limit: int, *, after: int = 0, before: int = sys.maxsize) -> list[LoggedProfile]:
        """Up to `limit` logged profiles with a `number` above `after` and below `before`, newest first."""

    async def by_id(self, decision_ids: Sequence[str]) -> Mapping[str, LoggedProfile]:
        """The profiles of these decisions by decision id; unknown ids are left out."""
