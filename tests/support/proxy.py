"""A TCP proxy in front of a unix socket, which can refuse connections or hold bytes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


class Proxy:
    """Opened with `proxy(...)`.

    A change of `target` applies to new connections. `holding` counts the pieces that are held back.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.holding = 0
        self._held: tuple[bytes, ...] = ()
        self._passing = asyncio.Event()
        self._passing.set()
        self._refusing = False
        self._released = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._listener is not None
        return int(self._listener.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Close all connections, and each new one at once, until `mend`."""
        self._refusing = True
        for writer in self._writers:
            writer.close()

    def silence(self) -> None:
        """Hold back bytes in both directions until `mend`; none are lost."""
        self._passing.clear()

    def hold(self, *words: bytes) -> None:
        """Hold back pieces with one of these words until `mend`; none are lost."""
        self._held = words

    def mend(self) -> None:
        """Forward everything again."""
        self._refusing = False
        self._held = ()
        self._released.set()
        self._passing.set()

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def close(self) -> None:
        if self._listener is None:
            return
        self._listener.close()
        writers = list(self._writers)
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_unix_connection(self.target)
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.get_running_loop().create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while piece := await source.read(1 << 16):
                self.holding += 1
                await self._passing.wait()
                if any(word in piece for word in self._held):
                    await self._released.wait()
                self.holding -= 1
                sink.write(piece)
                await sink.drain()
        except OSError:
            pass  # the connection was cut
        finally:
            sink.close()
            self._writers.discard(sink)


@asynccontextmanager
async def proxy(target: Path) -> AsyncIterator[Proxy]:
    """A proxy to the server on the unix socket `target`."""
    opened = Proxy(target)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()
