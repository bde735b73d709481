"""Starts, restarts, replaces and stops the child processes of `profiles up` and `profiles serve --processes N`."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import suppress

import msgspec

from app.cli.common import say
from app.listener import HAND_OVER_S

RESTART_AFTER_S = (0.2, 1.0, 5.0)
STABLE_S = 30.0
STOP_S = 15.0
READY_S = 60.0
GIVE_UP_CODES = (2, 3)


class Child(msgspec.Struct, eq=False):
    """A process that runs the command `profiles NAME`. `check`, called regularly, restarts a process that has died.
    With a `listener`, the process accepts connections from this socket, as its siblings do. It is killed if it has not
    stopped `stop_s` seconds after a signal."""

    name: str
    environment: dict[str, str]
    listener: socket.socket | None = None
    stop_s: float = STOP_S
    _ready: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _link: socket.socket | None = None  # the process reports on it, and stops when it is closed
    _started_at: float = 0.0
    _deaths: int = 0
    _start_at: float = 0.0

    def start(self) -> None:
        """Start the process in a new session, so that Ctrl-C reaches only the parent. The child gets this process's
        import path. `-P` excludes the working directory from that path, because it may contain another `app`."""
        self._started_at = time.monotonic()
        self._close_link()
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._link, theirs = socket.socketpair()
        self._link.setblocking(False)
        passed = {"--supervisor": theirs.fileno()}
        if self.listener is not None:
            passed["--listener"] = self.listener.fileno()
        options = [f"{name}={number}" for name, number in passed.items()]
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, "-P", "-m", "app", self.name, *options],
                env={**self.environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=tuple(passed.values()),
            )

    def check(self) -> int | None:
        """Restart the process after a delay if it has died; return None. If it ended with one of `GIVE_UP_CODES` before
        it was ever ready, a restart cannot help: return this exit code instead."""
        if self._process is None:
            if time.monotonic() >= self._start_at:
                try:
                    self.start()
                except OSError as error:
                    self._start_later(f"cannot be started: {error}")
            return None
        code = self._process.poll()
        # `ready` is read at every death: the report of this process is lost when the next one is started.
        if code is None or (not self.ready and code in GIVE_UP_CODES):
            return code
        if time.monotonic() - self._started_at > STABLE_S:
            self._deaths = 0
        self._start_later(f"died with exit code {code}")
        return None

    def _start_later(self, reason: str) -> None:
        delay = RESTART_AFTER_S[min(self._deaths, len(RESTART_AFTER_S) - 1)]
        self._deaths += 1
        self._process, self._start_at = None, time.monotonic() + delay
        say(f"{self.name} {reason}; restarting it in {delay:g} s", level="warning")

    @property
    def ready(self) -> bool:
        """Whether the process has ever reported that it is ready. This stays true when `check` restarts it."""
        if not self._ready and self._link is not None:
            with suppress(BlockingIOError):
                self._ready = bool(self._link.recv(1))  # nothing: it ended before it was ready
        return self._ready

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ask_to_stop(self, *, handing_over: bool = False) -> None:
        """Send SIGTERM. If the process is `handing_over` and shares its listener, send SIGUSR2 instead: the process
        leaves new connections to the other processes, and then stops."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR2 if handing_over and self.listener is not None else signal.SIGTERM)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the process has not ended after `stop_s` seconds."""
        self.ask_to_stop()
        if self._process is not None:
            try:
                self._process.wait(self.stop_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close_link()

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()


def replace_one_by_one(children: list[Child]) -> Generator[None, None, None]:
    """Replace each child in the list by a new one; yield while waiting. Each old process runs until the new one is
    ready. If a new process ends, or is not ready after `READY_S` seconds, it is stopped, and the old ones stay."""
    for place, old in enumerate(children):
        new = leaving = Child(old.name, old.environment, old.listener, old.stop_s)
        try:
            new.start()
            deadline = time.monotonic() + READY_S
            while not new.ready:
                if not new.running() or time.monotonic() > deadline:
                    say(f"the new {new.name} process is not ready; the old processes go on", level="error")
                    return
                yield
            children[place], leaving = new, old
            old.ask_to_stop(handing_over=True)
            deadline = time.monotonic() + HAND_OVER_S + old.stop_s
            while old.running() and time.monotonic() < deadline:
                yield
        except OSError as error:
            say(f"no new {new.name} process can be started: {error}; the old processes go on", level="error")
            return
        finally:
            leaving.stop()
    say(f"replaced {len(children)} processes")
