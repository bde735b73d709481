"""The deployment under test: a cache server, a queue server, API processes and workers, each with its own wall clock.

Clients and faults act on it. Every second process reaches the cache through a proxy that can fail.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
from bisect import bisect_right
from contextlib import closing, suppress
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any

from redis.asyncio import Redis

from app.settings import hash_key
from app.settings.parsers import PostgresUrl
from app.stores.migrate import migrate
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.http import answers
from tests.support.processes import Program, environment_of, free_port
from tests.support.proxy import Proxy
from tests.support.servers import OPTIONS
from tests.support.waiting import eventually_async
from tests.torture.checker import Moments
from tests.torture.launcher import set_clock

LAUNCHER = "tests.torture.launcher"
KEY = "a-key-for-the-torture-run"
TIMEOUT_MS = 100
LEASE_MS = 400
START_S = 60.0
RESTART_AFTER_S = 0.2
USUAL_SKEW_NS = 500_000_000  # of every second process


class FaultyProxy(Proxy):
    """A proxy that can also delay bytes, and break a connection in the middle of a command or a reply."""

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        self.delay_s = 0.0
        self.cut_pieces = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._serve(reader, writer)
        except OSError:  # the cache server is down
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while piece := await source.read(1 << 16):
                await self._passing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.cut_pieces:
                    self.cut_pieces -= 1
                    sink.write(piece[: len(piece) // 2])
                    await sink.drain()
                    return
                sink.write(piece)
                await sink.drain()
        except (OSError, RuntimeError):
            pass  # the connection was cut; uvloop raises RuntimeError for a closed transport
        finally:
            sink.close()
            self._writers.discard(sink)


class ProcessClock:
    """The wall clock of one process: that of this machine and an offset, which the process reads from a file."""

    def __init__(self, file: Path, usual_ns: int) -> None:
        """`usual_ns` is the offset while no fault has stepped the clock."""
        self.file = file
        self._usual_ns = usual_ns
        self._offsets: list[tuple[int, int]] = []  # since when, on the monotonic clock
        file.write_bytes(bytes(8))
        self.step(0)

    def step(self, ns: int) -> None:
        """Step to this far from the usual time."""
        set_clock(self.file, self._usual_ns + ns)
        self._offsets.append((time.monotonic_ns(), self._usual_ns + ns))

    def now_ms(self) -> int:
        return (time.time_ns() + self._offsets[-1][1]) // 1_000_000

    def shown(self, started: tuple[int, int], ended: tuple[int, int]) -> list[Moments]:
        """What the clock may have shown between two moments; each is given on the monotonic clock and the wall clock of
        this machine. If the clock stepped meanwhile, there is one pair for each offset."""
        last = bisect_right(self._offsets, ended[0], key=itemgetter(0))
        first = bisect_right(self._offsets, started[0], key=itemgetter(0)) - 1
        return [
            Moments((started[1] + offset) // 1_000_000, (ended[1] + offset) // 1_000_000)
            for _, offset in self._offsets[first:last]
        ]


class ProcessSlot:
    """The place of one process, which keeps its role and its clock when the process is killed and started again."""

    def __init__(
        self, role: str, cache_url: str, clock: ProcessClock, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()
    ) -> None:
        self.role = role
        self.cache_url = cache_url
        self.clock = clock
        self.host = host
        self.prefix = prefix  # of the command
        self.program: Program | None = None
        self.refusal = ""  # the output of the last attempt to start that failed
        self.port = 0
        self.lock = asyncio.Lock()  # held by the fault that stops, pauses or kills this process

    @property
    def up(self) -> bool:
        return self.port != 0


class Deployment:
    """Servers and processes. Call `open` before use, and `close` at the end."""

    def __init__(
        self, *, apis: int = 2, mutant: str | None = None, hesitate: str = "", disk: Path | None = None
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pf-"))
        self.disk = disk
        self.database = (disk or self.directory) / "profiles.db"
        self.cache = self._server("cache")
        self.queue = self._server("queue")
        self.proxy = FaultyProxy(self.cache.socket_path)
        self.dumps: list[Path] = []
        self.cache_lock = asyncio.Lock()
        self.queue_lock = asyncio.Lock()
        self.apis: list[ProcessSlot] = []
        self.workers: list[ProcessSlot] = []
        self._api_count = apis
        self._torture = {"TORTURE_HESITATE": hesitate, "TORTURE_MUTANT": mutant or ""}
        self._programs: list[Program] = []
        self._defects: list[str] = []
        self._redis: dict[Path, Redis] = {}

    @property
    def store(self) -> Path | PostgresUrl:
        return self.database

    async def open(self) -> None:
        migrate(self.store)
        for server in (self.cache, self.queue):
            await asyncio.to_thread(server.start)
        await self.proxy.open()
        urls = [self.cache.url, self.proxy.url]
        self.apis = [self._slot("serve", number, urls[number % 2]) for number in range(self._api_count)]
        # The fault `second_worker` starts the second.
        self.workers = [self._slot("worker", number, url) for number, url in enumerate(urls)]
        await asyncio.gather(*(self.start(slot) for slot in [*self.apis, self.workers[0]]))

    def _server(self, name: str) -> EmbeddedServer:
        return EmbeddedServer(self.directory / name, self.directory / f"{name}.sock", OPTIONS)

    def _slot(self, role: str, number: int, cache_url: str) -> ProcessSlot:
        clock = ProcessClock(self.directory / f"clock of {role} {number}", number % 2 * USUAL_SKEW_NS)
        return ProcessSlot(role, cache_url, clock)

    async def start(self, slot: ProcessSlot) -> None:
        """Start a process, and return when it serves or works.

        If it refuses to start (the disk is full, the database locked), it is started again, as a supervisor would do.
        """
        try:
            await eventually_async(lambda: self._try_to_start(slot), START_S, RESTART_AFTER_S)
        except AssertionError:
            raise AssertionError(f"a {slot.role} did not start within {START_S:.0f} s:\n{slot.refusal}") from None

    async def _try_to_start(self, slot: ProcessSlot) -> bool:
        port = free_port()
        settings: dict[str, Any] = {
            "database": self.store.url if isinstance(self.store, PostgresUrl) else self.store,
            "host": slot.host,
            "cache_url": slot.cache_url,
            "queue_url": self.queue.url,
            "cache_timeout_ms": TIMEOUT_MS,
            "lease_ms": LEASE_MS,
            "log_level": "info" if slot.role == "worker" else "warning",
            "worker_metrics_port": 0,
            "port": port,
            "api_keys": f"torture:admin:{hash_key(KEY).hex()}",
        }
        environment = {**environment_of(**settings), **self._torture, "TORTURE_CLOCK": str(slot.clock.file)}
        program = Program((LAUNCHER, slot.role), environment, self.directory, slot.prefix)
        self._programs.append(program)
        slot.program = program

        async def started_or_ended() -> bool:
            # An API process listens before it has opened the database, without which it ends.
            ready = await answers(port, slot.host) if slot.role == "serve" else "worker_started" in program.output
            return ready or not program.running

        await eventually_async(started_or_ended, START_S)
        if not program.running:
            slot.program = None
            slot.refusal = program.output[-3000:]
            self._forget(program)
            return False
        slot.port = port
        return True

    async def kill(self, slot: ProcessSlot) -> None:
        slot.port = 0
        if slot.program is not None:
            program, slot.program = slot.program, None
            self._forget(program)
            await asyncio.to_thread(program.kill)

    async def stop(self, slot: ProcessSlot) -> None:
        """Send SIGTERM and wait; an exit code other than 0 is a defect."""
        slot.port = 0
        if slot.program is not None:
            program, slot.program = slot.program, None
            code = await asyncio.to_thread(program.stop)
            self._forget(program)
            if code:
                self._defects.append(f"{slot.role} ended with {code}:\n{program.output[-2000:]}")

    def watch(self) -> None:
        """Record processes that ended by themselves as defects."""
        for slot in [*self.apis, *self.workers]:
            if slot.up and slot.program is not None and not slot.program.running:
                self._defects.append(f"a {slot.role} ended by itself:\n{slot.program.output[-3000:]}")
                slot.port = 0
                slot.program = None

    def pids(self) -> dict[str, int]:
        """The process ids of the running API processes and workers, by role and number."""
        return {
            f"{slot.role} {number}": slot.program.pid
            for slots in (self.apis, self.workers)
            for number, slot in enumerate(slots, start=1)
            if slot.program is not None
        }

    def a_cache(self, random: Random) -> EmbeddedServer:
        """The server that a fault of the cache is to happen to."""
        return self.cache

    async def ask(self, server: EmbeddedServer, *command: Any) -> Any:
        """Send a command directly to a server."""
        client = self._redis.get(server.socket_path)
        if client is None:
            client = Redis(unix_socket_path=str(server.socket_path), socket_timeout=2, socket_connect_timeout=2)
            self._redis[server.socket_path] = client
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def restart(self, server: EmbeddedServer, dump: Path | None = None) -> None:
        """Kill a server and start it, empty or with the contents of a dump."""

        def kill_and_start() -> None:
            server.kill()
            live = server.directory / "dump.rdb"
            live.unlink(missing_ok=True)
            if dump is not None:
                shutil.copyfile(dump, live)
            server.start()

        await asyncio.to_thread(kill_and_start)

    async def save(self) -> None:
        """Store a dump of the cache; the last six are kept."""
        await self.ask(self.cache, "SAVE")
        dump = self.directory / f"dump-{len(self.dumps)}.rdb"
        shutil.copyfile(self.cache.directory / "dump.rdb", dump)
        self.dumps.append(dump)
        for old in self.dumps[:-6]:
            old.unlink(missing_ok=True)

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Query the database directly."""
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql, parameters).fetchall()

    def damage(self) -> list[str]:
        """The findings of the database's own check of its files."""
        return [str(row) for row in self.rows("PRAGMA integrity_check") if row != ("ok",)][:5]

    def state(self) -> str:
        """Describe the state, for a run that does not settle."""
        (counts,) = self.rows(
            """SELECT (SELECT COUNT(*) FROM event_log), (SELECT COUNT(*) FROM outbox),
                      (SELECT MAX(received_at_ms) FROM outbox),
                      (SELECT COUNT(*) FROM owed_invalidations)"""
        )
        lines = [f"events, unconsumed, newest of these, owed: {counts}; the clock says {time.time() * 1000:.0f}"]
        for slot in [*self.apis, *self.workers]:
            output = slot.program.output[-1500:] if slot.program is not None else ""
            lines.append(f"{slot.role} at {slot.port}:\n{output}")
        return "\n".join(lines)

    def defects(self) -> list[str]:
        """Processes that ended by themselves or with an error, and tracebacks in the output of all processes."""
        return [*self._defects, *(found for program in self._programs if (found := _traceback(program)))]

    async def close(self) -> None:
        for client in self._redis.values():
            await client.aclose()
        await self.proxy.close()
        for program in self._programs:
            if program.running:
                await asyncio.to_thread(program.close)
        for server in (self.cache, self.queue):
            await asyncio.to_thread(server.kill)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _forget(self, program: Program) -> None:
        """Check the output of a process that has ended now, since a run may start thousands."""
        if found := _traceback(program):
            self._defects.append(found)
        self._programs.remove(program)


def _traceback(program: Program) -> str:
    with suppress(OSError):
        output = program.output
        at = output.find("Traceback")
        if at >= 0:
            return f"{program.name} printed:\n{output[max(0, at - 500) : at + 2500]}"
    return ""
