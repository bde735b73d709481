"""Starts, restarts and stops a child process of `profiles up`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from app.cli.common import say

RESTART_AFTER_S = (0.2, 1.0, 5.0)
STABLE_S = 30.0
STOP_S = 15.0
GIVE_UP_CODES = (2, 3)


class Child:
    """A process that runs the command `profiles NAME`. `check`, called regularly, restarts it if it has died."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._deaths = 0
        self._start_at = 0.0

    def start(self) -> None:
        """Start the process in a new session, so that Ctrl-C reaches only the parent. The child gets this process's
        import path. `-P` excludes the working directory from that path, because it may contain another `app`."""
        self._started_at = time.monotonic()
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = subprocess.Popen(  # noqa: S603  # our own program
            [sys.executable, "-P", "-m", "app", self.name, "--with-parent", str(os.getpid())],
            env={**self._environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def check(self) -> int | None:
        """Restart the process after a delay if it has died; return its exit code only if a restart cannot help."""
        if self._process is None:
            if time.monotonic() >= self._start_at:
                self.start()
            return None
        code = self._process.poll()
        if code is None:
            return None
        if code in GIVE_UP_CODES:
            return code
        if time.monotonic() - self._started_at > STABLE_S:
            self._deaths = 0
        delay = RESTART_AFTER_S[min(self._deaths, len(RESTART_AFTER_S) - 1)]
        self._deaths += 1
        self._process, self._start_at = None, time.monotonic() + delay
        say(f"{self.name} died with exit code {code}; restarting it in {delay:g} s", level="warning")
        return None

    def ask_to_stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the process has not ended after `STOP_S` seconds."""
        self.ask_to_stop()
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
