"""Places where a test stops the code under test, so that an interleaving happens exactly as written down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence

from app.profiles.ports import Cache, Cell, ComputeRow, Epoch, Fill, Row, Snapshot, Source

DEADLINE_S = 30.0


async def turn(seconds: float = 0) -> None:
    """Let everybody else run once; never a wait for something to happen."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    timer = loop.call_later(seconds, over.set_result, None)
    try:
        await over
    finally:
        timer.cancel()


class PausePoint:
    """Open until `stop` is called; then whoever comes waits until `go`."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._reached = asyncio.Event()
        self._takes_one = False

    def stop(self, *, one: bool = False) -> None:
        """The next one waits, and all after it, or only that `one`."""
        self._open.clear()
        self._reached.clear()
        self._takes_one = one

    def go(self) -> None:
        """Let them on, and keep open."""
        self._open.set()

    async def reached(self) -> None:
        """Return when somebody waits here."""
        async with asyncio.timeout(DEADLINE_S):
            await self._reached.wait()

    async def pass_through(self) -> None:
        """What the code under test awaits."""
        if not self._open.is_set() and not (self._takes_one and self._reached.is_set()):
            self._reached.set()
            async with asyncio.timeout(DEADLINE_S):
                await self._open.wait()


class PausableSource:
    """A source that can be stopped just before and just after its snapshot, or made to fail; counts its statements."""

    def __init__(self, source: Source) -> None:
        self.inner = source
        self.before = PausePoint()
        self.after = PausePoint()
        self.failure: Exception | None = None
        self.statements: list[list[ComputeRow]] = []

    def go(self) -> None:
        """Let whatever is stopped go on."""
        self.before.go()
        self.after.go()

    async def compute(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """As the source does."""
        self.statements.append(list(asked))
        await self.before.pass_through()
        if self.failure is not None:
            raise self.failure
        snapshot = await self.inner.compute(clock_ms, asked)
        await self.after.pass_through()
        return snapshot

    async def fitting(self, asked: Sequence[ComputeRow]) -> int:
        """As the source does; it is not stopped."""
        return await self.inner.fitting(asked)

    async def attempt(self, clock_ms: int, asked: Sequence[ComputeRow]) -> Snapshot:
        """As the source does; it is not stopped."""
        return await self.inner.attempt(clock_ms, asked)


class PausableCache:
    """A cache that can be stopped before each kind of command, and after a read of rows; counts commands by name."""

    def __init__(self, cache: Cache) -> None:
        self.inner = cache
        self.before_read = PausePoint()
        self.after_read = PausePoint()
        self.before_lease = PausePoint()
        self.before_fill = PausePoint()
        self.before_drop = PausePoint()
        self.commands: Counter[str] = Counter()
        self.answered_reads = 0
        self.filled: list[Fill] = []

    def go(self) -> None:
        """Let whatever is stopped go on."""
        for pause_point in (
            self.before_read,
            self.after_read,
            self.before_lease,
            self.before_fill,
            self.before_drop,
        ):
            pause_point.go()

    @property
    def available(self) -> bool:
        """As the cache says."""
        return self.inner.available

    async def read(self, cells: Sequence[Cell]) -> tuple[Epoch, list[bytes | None]]:
        """As the cache does."""
        self.commands["read"] += 1
        await self.before_read.pass_through()
        return await self.inner.read(cells)

    async def read_rows(self, rows: Sequence[Row]) -> tuple[Epoch, list[bytes | None]]:
        """As the cache does; counted with `read`, for it is one command like that."""
        self.commands["read"] += 1
        await self.before_read.pass_through()
        found = await self.inner.read_rows(rows)
        self.answered_reads += 1
        await self.after_read.pass_through()
        return found

    async def lease(self, epoch: Epoch, cells: Sequence[Cell]) -> list[bytes]:
        """As the cache does; a call that asks for nothing does not count."""
        if cells:
            self.commands["lease"] += 1
        await self.before_lease.pass_through()
        return await self.inner.lease(epoch, cells)

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """As the cache does."""
        self.commands["fill"] += 1
        await self.before_fill.pass_through()
        self.filled.extend(fills)
        return await self.inner.fill(epoch, fills)

    async def drop(self, cells: Collection[Cell]) -> None:
        """As the cache does."""
        self.commands["drop"] += 1
        await self.before_drop.pass_through()
        await self.inner.drop(cells)

    async def drop_exactly(self, epoch: Epoch, held: Sequence[tuple[Cell, bytes]]) -> int:
        """As the cache does."""
        self.commands["drop_exactly"] += 1
        return await self.inner.drop_exactly(epoch, held)

    async def drop_user(self, user_id: str) -> None:
        """As the cache does."""
        await self.inner.drop_user(user_id)

    async def check(self) -> None:
        """As the cache does."""
        await self.inner.check()
