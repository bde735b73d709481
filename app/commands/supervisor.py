"""`profiles up`: two embedded servers, the API and a worker, kept running until Ctrl-C.

Order: lock, migrate, servers, demonstration set, children; stopping goes the other way round, so that whoever uses a
server stops before it. Invariant: when `supervise` returns, nothing it started is running.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import click

from app.commands.output import err, run, running_servers
from app.errors import SettingsError, Unavailable
from app.settings import PREFIX, Settings
from app.stores.valkey.embedded import EmbeddedServer, cache_options, queue_options

LOOK_S = 0.1
RESTART_AFTER_S = (0.2, 1.0, 5.0)
STABLE_S = 30.0
STOP_S = 15.0
SOCKET_PATH_LIMIT = 100
GIVE_UP_CODES = (2, 3)
CHILDREN = ("serve", "worker")


class Child:
    """A process of ours that is started again when it dies."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._deaths = 0
        self._start_at = 0.0

    def start(self) -> None:
        """Start; in a session of its own, so that Ctrl-C reaches only us."""
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  # ourselves
            [sys.executable, "-m", "app", self.name, "--with-parent"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def look(self) -> int | None:
        """Start it again where it died; its exit code where that is no use."""
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
        err.print(f"[yellow]{self.name} died (exit code {code}); starting it again in {delay:g} s[/]")
        return None

    def ask_to_stop(self) -> None:
        """SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that is not heeded."""
        self.ask_to_stop()
        if self._process is not None:
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def supervise(settings: Settings) -> int:
    """Run until SIGINT or SIGTERM; the exit code."""
    settings.require_safe_binding()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _only_one(settings.database.parent):
        _require_free_port(settings)
        fresh = _migrate(settings.database)
        with _servers(settings) as (servers, cache_url, queue_url):
            # Commands, the demonstration set among them, find the servers through this file and the environment.
            environment = {
                **os.environ,
                PREFIX + "DATABASE": str(settings.database),
                PREFIX + "CACHE_URL": cache_url,
                PREFIX + "QUEUE_URL": queue_url,
            }
            with _announced(settings.database, cache_url, queue_url):
                if fresh and settings.demo and not stop.is_set():
                    _load_demo()
                return _keep_running(settings, servers, environment, stop)


def _keep_running(
    settings: Settings, servers: list[EmbeddedServer], environment: dict[str, str], stop: threading.Event
) -> int:
    children = [Child(name, environment) for name in CHILDREN]
    code, greeted = 0, False
    try:
        for child in children:
            child.start()
        while not stop.wait(LOOK_S):
            for server in servers:
                if not server.running():
                    err.print(f"[yellow]the embedded server on {server.socket_path.name} died; starting it again[/]")
                    server.start()
            codes = [found for child in children if (found := child.look()) is not None]
            if codes:
                code = codes[0]
                break
            if not greeted and _answers(settings):
                greeted = True
                _greet(settings)
    finally:
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop()
    err.print("stopped")
    return code


@contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "up.lock").open("w")
    except OSError as error:
        raise SettingsError("PROFILES_DATABASE", f"cannot write to {directory}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Unavailable(f"`profiles up` runs already on {directory}") from error
        yield


def _require_free_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise SettingsError(
                "PROFILES_PORT", f"cannot serve on {settings.host}:{settings.port}: {error.strerror}"
            ) from error


def _migrate(database: Path) -> bool:
    """Migrate; whether the database is new."""
    from app.stores.sqlite.migrate import migrate

    before, _ = migrate(database)
    return before is None


def _load_demo() -> None:
    from app.commands.change import load_demo

    err.print("loading the demonstration set: 1,000 users, 90 days ...")
    count = run(load_demo(1_000, 90, 1))
    err.print(f"{count:,} events stored")


@contextmanager
def _servers(settings: Settings) -> Iterator[tuple[list[EmbeddedServer], str, str]]:
    """Start what is not named in the settings; yields our servers and both URLs."""
    directory = settings.database.parent.resolve() / "run"
    directory.mkdir(parents=True, exist_ok=True)
    with _socket_directory(directory) as sockets:
        wanted: list[tuple[str, str | None, list[str]]] = [
            ("cache", settings.cache_url, cache_options(settings.embedded_cache_mb)),
            ("queue", settings.queue_url, queue_options()),
        ]
        started: list[EmbeddedServer] = []
        urls: list[str] = []
        try:
            for name, url, options in wanted:
                if url is not None:
                    urls.append(url)
                    continue
                server = EmbeddedServer(directory / name, sockets / f"{name}.sock", options)
                server.take_over()
                server.start()
                started.append(server)
                urls.append(server.url)
            yield started, urls[0], urls[1]
        finally:
            for server in reversed(started):
                server.stop()


@contextmanager
def _socket_directory(preferred: Path) -> Iterator[Path]:
    """A socket's path must be short; where ours would not be, a temporary directory serves."""
    if len(str(preferred / "cache.sock")) <= SOCKET_PATH_LIMIT:
        yield preferred
        return
    with tempfile.TemporaryDirectory(prefix="profiles-") as short:
        yield Path(short)


@contextmanager
def _announced(database: Path, cache_url: str, queue_url: str) -> Iterator[None]:
    file = running_servers(database)
    file.write_text(json.dumps({"pid": os.getpid(), "cache_url": cache_url, "queue_url": queue_url}))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _answers(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=1)
    with suppress(OSError, http.client.HTTPException), closing(connection):
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    return False


def _base(settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def _greet(settings: Settings) -> None:
    base = _base(settings)
    click.echo(
        f"""
Up. Try, in another terminal:

  curl {base}/profiles/user-0001
  curl -H 'Content-Type: application/json' {base}/events -d '{{"subject": "signals.tip.feedback",
    "event_id": "try-1", "user_id": "user-0001", "tip_id": "tip-1", "action": "completed",
    "occurred_at": "'$(date -u +%Y-%m-%dT%H:%M:%SZ)'"}}'
  curl {base}/profiles/user-0001

  {base}/schema   the API        {base}/readyz   its state        Ctrl-C stops everything
""",
        err=True,
    )
