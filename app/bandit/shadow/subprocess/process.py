"""Starts the shadow subprocess when it is first needed, sends decisions to it, and restarts it if it dies.

Invariant: every group of decisions is answered with its shadows or with an error. The subprocess has no side effects,
so a group can be sent again to a new subprocess.
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
log = logger("bandit.shadow.subprocess")


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    reader: StreamReader
    writer: StreamWriter


class ShadowSubprocess:
    """Controls the shadow subprocess. Implements `app.bandit.shadow.queue.ShadowWork`."""

    def __init__(self, answer_s: float = ANSWER_S) -> None:
        """`answer_s`: the time in seconds without an answer after which the subprocess counts as stuck and is ended."""
        self._answer_s = answer_s
        self._running: _Running | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id of the running subprocess; None if none is running."""
        return None if self._running is None else self._running.process.pid

    async def shadows(self, group: Sequence[Unshadowed]) -> list[Shadow]:
        """Compute the shadow of each decision; the results may come in any order. Must not be called concurrently.

        Raises:
            Unavailable: the subprocess cannot be started, died in each of `TRIES` attempts, is stuck, answered with an
                error or with invalid data, or `close` was called.
        """
        question = framed(encode_decisions(group))
        for _ in range(TRIES):
            running = self._running or await self._start()
            found = None
            try:
                if (answer := await self._answer(running, question)) is not None:
                    found = _read(answer, group)
            finally:
                # Also after a cancellation: the late answer would be read as the answer to the next question.
                if found is None:
                    await self._end()
            if isinstance(found, Failure):
                raise Unavailable(f"the shadow subprocess failed: {found.reason}")
            if found is not None:
                return found
        raise Unavailable(f"the shadow subprocess died in each of {TRIES} attempts")

    async def close(self) -> None:
        """End the subprocess and start no other. A call of `shadows` that waits for it raises `Unavailable`."""
        self._closed = True
        await self._end()

    async def _answer(self, running: _Running, question: bytes) -> bytes | None:
        """Send a question and read the answer; None if the subprocess died."""
        try:
            async with asyncio.timeout(self._answer_s):
                running.writer.write(question)
                return await next_frame(running.reader)
        except TimeoutError as error:
            raise Unavailable(f"the shadow subprocess did not answer within {self._answer_s:g} s") from error
        except (OSError, RuntimeError):
            return None  # uvloop raises RuntimeError if the connection was closed meanwhile

    async def _start(self) -> _Running:
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                # Connect before starting the subprocess: 1. this task waits here; 2. it is cancelled, or `close` is
                # called; 3. a subprocess started before would not be known to `_end`, and keep running.
                reader, writer = await asyncio.open_connection(sock=ours)
                try:
                    if self._closed:
                        raise Unavailable("no shadow subprocess is started while this process stops")
                    self._running = _Running(_spawn(theirs), reader, writer)
                except BaseException:
                    writer.transport.abort()
                    raise
        except OSError as error:
            raise Unavailable(f"the shadow subprocess cannot be started: {error}") from error
        log.info("shadow_subprocess_started", pid=self._running.process.pid)
        return self._running

    async def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.writer.transport.abort()  # the subprocess ends when its socket is closed
            await asyncio.to_thread(_wait, running.process)


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    # The subprocess reads no settings, so it gets none, since they contain secrets. One thread is enough for its small
    # matrices. It imports from the same directories as this process; -P keeps the working directory, which may contain
    # another `app`, from coming first.
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
        raise Unavailable(f"the shadow subprocess sent an answer that cannot be decoded: {error}") from error
    if not isinstance(found, Failure) and {item.decision_id for item in found} != {item.decision_id for item in group}:
        raise Unavailable("the shadow subprocess sent shadows of other decisions")
    return found
