"""A group for forced schedules: one database, one server, and as many processes as a schedule needs."""

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from app.features.registry import Registry
from app.profiles.online.local_cache import LocalCache
from app.profiles.ports import Epoch, Fill
from app.settings.parsers import PostgresUrl
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.connections import Command, PipelinedConnection
from app.stores.valkey.embedded import EmbeddedServer
from app.stores.valkey.single_server import SingleServer
from tests.support.clock import FakeClock
from tests.support.pause_points import DEADLINE_S, PausePoint, turn
from tests.support.registry import REGISTRY
from tests.support.servers import ask
from tests.support.service import LEASE_MS, TIMEOUT_MS, PausableService, open_gated, over

T = TypeVar("T")


class PlainSet(ValkeyCache):
    """A mutant: it fills whatever the key holds."""

    async def fill(self, epoch: Epoch, fills: Sequence[Fill]) -> list[bool]:
        """SET without comparing."""
        commands: list[Command] = [(b"SET", key(epoch, fill.cell), fill.value, b"PX", fill.ttl_ms) for fill in fills]
        users = [fill.cell.user_id for fill in fills]
        await self._send("fill", "back", users, lambda *_: commands, epoch)
        return [True] * len(fills)


class _OneEpoch(SingleServer):
    def epoch(self, connection: PipelinedConnection) -> str:
        return "forever"


class ConstantEpoch(ValkeyCache):
    """A mutant: it takes every server for the same one."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._servers = _OneEpoch(parts["url"], parts["timeout_ms"] / 1000, parts["registration"], parts["metrics"])


class Kind(NamedTuple):
    """Which caches the processes of a group use: the true ones, or a mutant that a schedule must catch."""

    name: str
    cache: type[ValkeyCache] = ValkeyCache
    nonce: Callable[[], bytes] | None = None
    local_cache: type[LocalCache] = LocalCache


TRUE = Kind("true")
PLAIN_SET = Kind("plain-set", cache=PlainSet)
CONSTANT_EPOCH = Kind("constant-epoch", cache=ConstantEpoch)
SAME_NONCE = Kind("same-nonce", nonce=lambda: b"same")


class ServiceGroup:
    """Use as a context; on the way out every process is closed and every task ended."""

    def __init__(self, store: Path | PostgresUrl, server: EmbeddedServer, kind: Kind = TRUE) -> None:
        self.store = store
        self.server = server
        self.clock = FakeClock()
        self._kind = kind
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[Any]] = []
        self._services: list[PausableService] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for service in self._services:
            service.go()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def open(
        self,
        registry: Registry = REGISTRY,
        *,
        lease_ms: int = LEASE_MS,
        timeout_ms: int = TIMEOUT_MS,
        url: str | None = None,
        clock: FakeClock | None = None,
        **settings: Any,
    ) -> PausableService:
        """One more process, with the clock of the group or one of its own, and settings by keyword."""
        make = over(
            url or self.server.url,
            lease_ms=lease_ms,
            timeout_ms=timeout_ms,
            kind=self._kind.cache,
            nonce=self._kind.nonce,
        )
        service = await self._stack.enter_async_context(
            open_gated(self.store, make, clock or self.clock, registry, self._kind.local_cache, **settings)
        )
        self._services.append(service)
        return service

    async def started(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin `work`; it has run up to its first wait when this returns."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        await turn()
        return task

    async def stopped_at(self, pause_point: PausePoint, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin `work` and return when it waits at `pause_point`."""
        pause_point.stop()
        task = await self.started(work)
        arrival = await self.started(pause_point.reached())
        await asyncio.wait({task, arrival}, return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
        assert arrival.done(), f"the work did not stop where it should: {task}"
        return task

    def save(self) -> Path:
        """A dump of the cache as it is now, put aside."""
        ask(self.server, "SAVE")
        aside = self.server.directory / "aside.rdb"
        shutil.copyfile(self.server.directory / "dump.rdb", aside)
        return aside

    def restart(self, dump: Path | None = None) -> None:
        """Kill the server and start it again, empty or with the contents of a dump."""
        self.server.kill()
        live = self.server.directory / "dump.rdb"
        live.unlink(missing_ok=True)
        if dump is not None:
            shutil.copyfile(dump, live)
        self.server.start()
