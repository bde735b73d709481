"""Computes features in the database, with one statement on one thread. If the statement takes too long, or fails
because of one feature's SQL (an overflow, malformed JSON), each feature is computed separately for each user. Only the
faulty values then fail. A feature whose SQL has failed once is computed separately from then on, so that it does not
make the statement of the other features fail."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from operator import or_
from time import monotonic
from typing import Any, ClassVar

from app.features.events import RELATIONS
from app.features.registry import Registry, indices
from app.profiles.ports import END_OF_TIME_MS, ComputeRow, Snapshot
from app.stores.sql.database import Connection, Database, Reader
from app.stores.sql.profile_statement import Dialect, build

TIMEOUT_S = 2.0
# The most events that the features of a statement may read: some 50 ms. Each row counts as `ROW_EVENTS` more events.
SLICE_EVENTS = 1_000_000
ROW_EVENTS = 200
_COUNT = """(SELECT COUNT(*) FROM (
        SELECT 1 FROM {table} WHERE user_id = :user_id
        AND occurred_at_ms > CAST(:at_ms AS BIGINT) - :window_ms AND occurred_at_ms <= :at_ms LIMIT :most
    ) AS counted)"""
COUNT_EVENTS = f"SELECT {_COUNT.format(table='tip_views')} + {_COUNT.format(table='tip_feedback')}"


class SqlSource(ABC):
    """Computes features, on at most `width` connections at the same time. Implements `app.profiles.ports.Source`."""

    dialect: ClassVar[Dialect]
    errors: ClassVar[type[Exception]]  # of the engine

    def __init__(self, database: Database, registry: Registry, *, width: int = 2, timeout_s: float = TIMEOUT_S) -> None:
        self._database, self._readers = database, database.readers
        self._statements = build(registry, self.dialect)
        windows = self._statements.windows
        # For each feature, the places in `windows` of its relations, and its window.
        self._windows = [
            (tuple(windows.index((name, entry.window_ms)) for name in entry.relations or RELATIONS), entry.window_ms)
            for entry in registry
        ]
        self._window_ms = registry.longest_window_ms(registry.full_mask)
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(width)
        self._separate = 0  # mask of the features that are computed separately

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        async with self._slots, self._readers.one() as reader:
            return await self._compute(reader, clock_ms, asked)

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        if len(asked) == 1:
            return 1

        def count(connection: Connection) -> int:
            left = SLICE_EVENTS
            for place, row in enumerate(asked):
                features = row.mask.bit_count() or 1
                bounds = {"at_ms": row.now_ms, "window_ms": self._window_ms, "most": left // features + 1}
                (events,) = connection.execute(COUNT_EVENTS, {"user_id": row.user_id, **bounds}).fetchone()
                left -= features * (events + ROW_EVENTS)
                if left < 0:
                    return max(1, place)
            return len(asked)

        async with self._slots, self._readers.one() as reader:
            return await reader.run(count)

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """Compute the rows on a spare connection, which does not count towards `width`. If the SQL of a feature had
        failed before but succeeds now, the feature is no longer computed separately."""
        async with self._readers.one() as reader:
            snapshot = await self._compute(reader, clock_ms, asked)
        failed = {index for _, index in snapshot.errors}
        for index in indices(_union(asked)):
            if index not in failed:
                self._separate &= ~(1 << index)
        return snapshot

    async def _compute(self, reader: Reader, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        separate = _union(asked) & self._separate
        if not separate:
            try:
                return await self._run(reader, clock_ms, asked)
            except self.errors as error:
                if reader.closing or self.is_database_fault(error):
                    raise
                separate = _union(asked)
        try:
            await reader.run(lambda connection: connection.execute(self._database.begin_snapshot))
            return await self._compute_separately(reader, clock_ms, asked, separate)
        finally:
            # Also if the BEGIN was queued when the caller was cancelled.
            await reader.run(lambda connection: connection.rollback())

    async def _run(
        self, reader: Reader, clock_ms: int, asked: Sequence[ComputeRow], timeout_s: float | None = None
    ) -> Snapshot:
        live = all(row.now_ms is None for row in asked)
        parameters: dict[str, object] = {"clock_ms": clock_ms}
        if live and len(asked) == 1:
            statement = self._statements.one
            parameters |= {"user_id": asked[0].user_id, "mask": asked[0].mask}
        elif live:
            statement = self._statements.live
        elif any(row.version is not None for row in asked):
            statement = self._statements.repeated
        else:
            statement = self._statements.past
        if statement is not self._statements.one:
            parameters["asked"] = json.dumps([row[:2] for row in asked] if live else asked)
        rows = await reader.run(
            lambda connection: self.fetch(connection, statement, parameters), timeout_s or self._timeout_s
        )
        values = 1 + len(self._statements.windows) if live else 1  # the first column of them
        return Snapshot(
            [row[values:] for row in rows],
            [row[0] for row in rows],
            [self._leaves_ms(row[1:values]) for row in rows] if live else [()] * len(rows),
            {},
        )

    def _leaves_ms(self, oldest: Sequence[int | None]) -> Sequence[int]:
        """For each feature, the time at which the oldest event in its window leaves the window; `END_OF_TIME_MS` if the
        window is empty. `oldest`: the time of the oldest event in each of `Statements.windows`."""
        return [
            min(END_OF_TIME_MS if (ms := oldest[place]) is None else ms + window_ms for place in places)
            for places, window_ms in self._windows
        ]

    async def _compute_separately(
        self, reader: Reader, clock_ms: int, asked: Sequence[ComputeRow], separate: int
    ) -> Snapshot:
        """Compute the features in the bit mask `separate` with a statement per feature and user, and all other features
        with one statement. The statements of one feature together may take `timeout_s`."""
        try:
            snapshot = await self._run(reader, clock_ms, [row._replace(mask=row.mask & ~separate) for row in asked])
        except self.errors as error:
            if reader.closing or self.is_database_fault(error):
                raise
            separate = _union(asked)
            snapshot = await self._run(reader, clock_ms, [row._replace(mask=0) for row in asked])
        rows = [list(row) for row in snapshot.rows]
        errors: dict[tuple[int, int], str] = {}
        overdue: dict[int, str] = {}
        left_s = dict.fromkeys(indices(separate), self._timeout_s)
        for place, row in enumerate(asked):
            for index in indices(row.mask & separate):
                if index in overdue:
                    errors[place, index] = overdue[index]
                    continue
                started = monotonic()
                try:
                    alone = await self._run(reader, clock_ms, [row._replace(mask=1 << index)], left_s[index])
                    rows[place][index] = alone.rows[0][index]
                except self.errors as error:
                    if reader.closing or self.is_database_fault(error):
                        raise
                    self._separate |= 1 << index
                    errors[place, index] = f"the SQL failed: {error}"
                    if self.interrupted(error):
                        users = sum(one.mask >> index & 1 for one in asked[: place + 1])
                        named = "one user" if users == 1 else f"{users} users together"
                        too_long = f"the SQL took longer than {self._timeout_s * 1000:,.0f} ms for {named}"
                        overdue[index] = errors[place, index] = too_long
                left_s[index] = max(0.001, left_s[index] - (monotonic() - started))
        return snapshot._replace(rows=rows, errors=errors, overdue=sum(1 << index for index in overdue))

    def fetch(self, connection: Any, statement: str, parameters: dict[str, object]) -> list[Any]:
        """Run a statement. If it fails within a transaction, the transaction stays usable."""
        rows: list[Any] = connection.execute(statement, parameters).fetchall()
        return rows

    @abstractmethod
    def is_database_fault(self, error: Any) -> bool:
        """Whether the database, not the SQL of a feature, caused `error`, an instance of `self.errors`."""

    @abstractmethod
    def interrupted(self, error: Any) -> bool: ...


def _union(asked: Sequence[ComputeRow]) -> int:
    return reduce(or_, (row.mask for row in asked), 0)
