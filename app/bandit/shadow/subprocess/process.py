"""The handle of the process beside: started when first needed, started again when it died, ended with us.

Owns the invariant that every group of decisions is answered, or an error says that it is not. Nothing but arithmetic is
done over there, so doing a group again does no harm.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from app.bandit.decisions import Shadow
from app.bandit.shadow.scores import Unshadowed
from app.bandit.shadow.subprocess.frames import framed, next_frame
from app.bandit.shadow.subprocess.wire import Failure, decode_answer, encode_decisions
from app.errors import Unavailable
from app.telemetry import logger

ANSWER_S = 60.0
END_S = 1.0
TRIES = 2
log = logger("aside")


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    reader: StreamReader
    writer: StreamWriter


class ProcessBeside:
    """Works shadows out in a process of low priority. Implements `app.bandit.shadow.queue.ShadowWork`."""

    def __init__(self, answer_s: float = ANSWER_S) -> None:
        """`answer_s`: how long a group may take, on however busy a machine, until the process counts as stuck."""
        self._answer_s = answer_s
        self._running: _Running | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return None if self._running is None else self._running.process.pid

    async def shadows(self, group: Sequence[Unshadowed]) -> list[Shadow]:
        """In no order. One group at a time.

        Raises:
            Unavailable: the process cannot be started, died again and again, is stuck, or says that it failed.
        """
        question = framed(encode_decisions(group))
        for _ in range(TRIES):
            running = self._running or await self._start()
            found = None
            try:
                if (answer := await self._answer(running, question)) is not None:
                    found = _read(answer, group)
            finally:
                # Also where we are cancelled: a late answer would be taken for that of the next question.
                if found is None:
                    await self._end()
            if isinstance(found, Failure):
                raise Unavailable(f"shadows cannot be worked out: {found.reason}")
            if found is not None:
                return found
        raise Unavailable("the process that works shadows out died")

    async def close(self) -> None:
        """End the process. Who waits for it is told; nobody starts another."""
        self._closed = True
        await self._end()

    async def _answer(self, running: _Running, question: bytes) -> bytes | None:
        """None where the process died."""
        try:
            async with asyncio.timeout(self._answer_s):
                running.writer.write(question)
                return await next_frame(running.reader)
        except TimeoutError as error:
            raise Unavailable(f"no shadows for {self._answer_s:g} s") from error
        except (OSError, RuntimeError):
            return None  # uvloop says RuntimeError where the connection closed meanwhile

    async def _start(self) -> _Running:
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                # First, for here we may be cancelled, or closed: a process that was started would be lost.
                reader, writer = await asyncio.open_connection(sock=ours)
                try:
                    if self._closed:
                        raise Unavailable("about to stop")
                    self._running = _Running(_spawn(theirs), reader, writer)
                except BaseException:
                    writer.transport.abort()
                    raise
        except OSError as error:
            raise Unavailable(f"the process that works shadows out does not start: {error}") from error
        log.info("process_beside_started", pid=self._running.process.pid)
        return self._running

    async def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.writer.transport.abort()  # it ends when its input does
            await asyncio.to_thread(_wait, running.process)


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    # It asks nothing of the settings, so it need not know the keys; and it works on one small matrix at a time. It
    # imports from where we do, and not first (-P) from the working directory, which may hold another `app`.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PROFILES_")}
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "app.bandit.shadow.subprocess"],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        env={**kept, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
        process_group=0,
    )


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(answer: bytes, group: Sequence[Unshadowed]) -> list[Shadow] | Failure:
    try:
        found = decode_answer(answer)
    except msgspec.DecodeError as error:
        raise Unavailable(f"the process that works shadows out answers nonsense: {error}") from error
    if not isinstance(found, Failure) and {item.decision_id for item in found} != {item.decision_id for item in group}:
        raise Unavailable("the process that works shadows out answers nonsense: shadows of other decisions")
    return found
