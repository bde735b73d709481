"""Everything that is tortured: servers, processes, one way to the cache through a proxy, and the wall clock.

Faults and clients meet here. A slot is a place of a process; who sits in it changes when it is killed.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from app.stores.sqlite.migrate import migrate
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.processes import Program, environment_of, free_port
from tests.support.proxy import Proxy
from tests.support.servers import OPTIONS
from tests.support.waiting import eventually_async
from tests.torture.launcher import set_clock

LAUNCHER = "tests.torture.launcher"
TIMEOUT_MS = 100
LEASE_MS = 400
START_S = 60.0
RESTART_AFTER_S = 0.2


class Way(Proxy):
    """A process's way to the cache: it can also delay replies, and be cut in the middle of a command or a reply."""

    def __init__(self, target: Path) -> None:
        super().__init__(target)
        self.delay_s = 0.0
        self.cut_pieces = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._serve(reader, writer)
        except OSError:  # nobody listens behind it
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
            pass  # cut; uvloop says of a closed transport that it is one
        finally:
            sink.close()
            self._writers.discard(sink)


class Slot:
    """A place for one process."""

    def __init__(self, role: str, cache_url: str) -> None:
        self.role = role
        self.cache_url = cache_url
        self.program: Program | None = None
        self.port = 0
        self.turn = asyncio.Lock()  # one fault at a time is about this process

    @property
    def up(self) -> bool:
        """Whether it has said that it serves."""
        return self.port != 0


class Site:
    """Use `open` and `close`."""

    def __init__(
        self, *, apis: int = 2, mutant: str | None = None, hesitate: str = "", disk: Path | None = None
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pf-"))
        self.disk = disk
        self.database = (disk or self.directory) / "profiles.db"
        self.clock = self.directory / "clock"
        self.cache = EmbeddedServer(self.directory / "cache", self.directory / "c.sock", OPTIONS)
        self.queue = EmbeddedServer(self.directory / "queue", self.directory / "q.sock", OPTIONS)
        self.way = Way(self.cache.socket_path)
        self.dumps: list[Path] = []
        self.cache_turn = asyncio.Lock()
        self.queue_turn = asyncio.Lock()
        self.ended: list[str] = []
        self._count = apis
        self._torture = {"TORTURE_CLOCK": str(self.clock), "TORTURE_HESITATE": hesitate, "TORTURE_MUTANT": mutant or ""}
        self._programs: list[Program] = []
        self.apis: list[Slot] = []
        self.workers: list[Slot] = []
        self._redis: dict[Path, Redis] = {}

    async def open(self) -> None:
        """Start everything; every other process goes by the proxy."""
        set_new(self.clock)
        migrate(self.database)
        for server in (self.cache, self.queue):
            await asyncio.to_thread(server.start)
        await self.way.open()
        urls = [self.cache.url, self.way.url]
        self.apis = [Slot("serve", urls[number % 2]) for number in range(self._count)]
        self.workers = [Slot("worker", url) for url in urls]  # the second is started by a fault
        await asyncio.gather(*(self.start(slot) for slot in [*self.apis, self.workers[0]]))

    async def start(self, slot: Slot) -> None:
        """Start a process in its slot, and return when it serves or works.

        Where it refuses to start (the disk is full, the database locked), it is started again, as whoever supervises
        it would.
        """
        await eventually_async(lambda: self._try_to_start(slot), START_S, RESTART_AFTER_S)

    async def _try_to_start(self, slot: Slot) -> bool:
        port = free_port()
        settings: dict[str, Any] = {
            "database": self.database,
            "cache_url": slot.cache_url,
            "queue_url": self.queue.url,
            "cache_timeout_ms": TIMEOUT_MS,
            "lease_ms": LEASE_MS,
            "log_level": "info" if slot.role == "worker" else "warning",
            "worker_metrics_port": 0,
            "port": port,
        }
        program = Program((LAUNCHER, slot.role), {**environment_of(**settings), **self._torture}, self.directory)
        self._programs.append(program)
        slot.program = program

        async def stands() -> bool:
            ready = await _listening(port) if slot.role == "serve" else "worker_started" in program.output
            return ready or not program.running

        await eventually_async(stands, START_S)
        if not program.running:
            slot.program = None
            self._note(program)
            return False
        slot.port = port
        return True

    async def kill(self, slot: Slot) -> None:
        """Kill -9."""
        slot.port = 0
        if slot.program is not None:
            program, slot.program = slot.program, None
            self._note(program)
            await asyncio.to_thread(program.kill)

    async def stop(self, slot: Slot) -> None:
        """SIGTERM, and wait."""
        slot.port = 0
        if slot.program is not None:
            program, slot.program = slot.program, None
            code = await asyncio.to_thread(program.stop)
            self._note(program)
            if code:
                self.ended.append(f"{slot.role} ended with {code}:\n{program.output[-2000:]}")

    def watch(self) -> None:
        """Notice processes that ended by themselves, and what they said of defects."""
        for slot in [*self.apis, *self.workers]:
            if slot.up and slot.program is not None and not slot.program.running:
                self.ended.append(f"a {slot.role} ended by itself:\n{slot.program.output[-3000:]}")
                slot.port = 0
                slot.program = None

    def pids(self) -> list[int]:
        """Of the service's processes that are up."""
        return [slot.program.pid for slot in [*self.apis, *self.workers] if slot.program is not None]

    async def ask(self, server: EmbeddedServer, *command: Any) -> Any:
        """A command of ours to a server, past the service."""
        client = self._redis.get(server.socket_path)
        if client is None:
            client = Redis(unix_socket_path=str(server.socket_path), socket_timeout=2, socket_connect_timeout=2)
            self._redis[server.socket_path] = client
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def restart(self, server: EmbeddedServer, dump: Path | None = None) -> None:
        """Kill a server and start it, empty or with old contents."""

        def anew() -> None:
            server.kill()
            live = server.directory / "dump.rdb"
            live.unlink(missing_ok=True)
            if dump is not None:
                shutil.copyfile(dump, live)
            server.start()

        await asyncio.to_thread(anew)

    async def save(self) -> None:
        """Put a dump of the cache aside; the last few are kept."""
        await self.ask(self.cache, "SAVE")
        aside = self.directory / f"dump-{len(self.dumps)}.rdb"
        shutil.copyfile(self.cache.directory / "dump.rdb", aside)
        self.dumps.append(aside)
        for old in self.dumps[:-6]:
            old.unlink(missing_ok=True)

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What the database says, read past the service."""
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql, parameters).fetchall()

    def state(self) -> str:
        """How things stand, for whoever wonders why they do not come to rest."""
        (counts,) = self.rows(
            """SELECT (SELECT COUNT(*) FROM event_log), (SELECT COUNT(*) FROM event_log WHERE consumed_at_ms IS NULL),
                      (SELECT MAX(received_at_ms) FROM event_log WHERE consumed_at_ms IS NULL),
                      (SELECT COUNT(*) FROM owed_invalidations)"""
        )
        lines = [f"events, unconsumed, newest of these, owed: {counts}; the clock says {time.time() * 1000:.0f}"]
        for slot in [*self.apis, *self.workers]:
            output = slot.program.output[-1500:] if slot.program is not None else ""
            lines.append(f"{slot.role} at {slot.port}:\n{output}")
        return "\n".join(lines)

    def defects(self) -> list[str]:
        """Tracebacks in what the processes printed."""
        found = list(self.ended)
        for program in self._programs:
            with suppress(OSError):
                if "Traceback" in (text := program.output):
                    place = text.index("Traceback")
                    found.append(f"{program.name} printed:\n{text[max(0, place - 500) : place + 2500]}")
        return found

    async def close(self) -> None:
        """End everything that was started."""
        for client in self._redis.values():
            await client.aclose()
        await self.way.close()
        for program in self._programs:
            if program.running:
                await asyncio.to_thread(program.close)
        for server in (self.cache, self.queue):
            await asyncio.to_thread(server.kill)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _note(self, program: Program) -> None:
        """A process whose output need not be looked at again; it may hold thousands."""
        if "Traceback" in (text := program.output):
            place = text.index("Traceback")
            self.ended.append(f"{program.name} printed:\n{text[max(0, place - 500) : place + 2500]}")
        self._programs.remove(program)


async def _listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def set_new(clock: Path) -> None:
    """A clock file without an offset."""
    clock.write_bytes(bytes(8))
    set_clock(clock, 0)
