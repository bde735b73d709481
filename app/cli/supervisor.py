"""`profiles up`: runs embedded servers, the API and a worker until Ctrl-C. `profiles serve --processes N`: runs N API
processes on one port.

The supervisor locks the data directory, opens the socket from which the API processes accept (see `app/README.md`),
migrates the database, starts the servers, stores the demonstration events and starts the child processes, in this
order. Every process stops before the servers that it uses. Invariant: when `supervise` returns, nothing it started is
running.
"""

import asyncio
import fcntl
import glob
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from app.cli.child import STOP_S, Child, replace_one_by_one
from app.cli.common import fail, running_servers, say
from app.concurrency.tasks import stop_signals
from app.errors import CacheUnavailable, SettingsError, Unavailable
from app.listener import drop_new_connections, listening_socket
from app.settings import FILE, PREFIX, Settings
from app.stores.migrate import migrate
from app.stores.valkey.embedded import QUEUE_OPTIONS, EmbeddedServer, cache_options

CHECK_S = 0.1
CHILDREN_STOP_S = 20.0
SERVER_RETRY_S = 2.0
SOCKET_PATH_LIMIT = 100


def supervise(settings: Settings) -> int:
    """Run the servers, the API and a worker until SIGINT, SIGTERM or SIGHUP (terminal closed); return the exit code."""
    settings.require_safe_binding()
    stop, restart = _signals()
    with ExitStack() as stack:
        stack.enter_context(_only_one(settings.directory))
        # If an earlier `up` was killed, its children are stopping and about to free their ports.
        wait_s = CHILDREN_STOP_S if running_servers(settings).exists() else 0
        listener = stack.enter_context(_listen(settings, "port", wait_s))
        settings = replace(settings, port=listener.getsockname()[1], drain_s=0)  # no balancer waits for a drain
        if settings.worker_metrics_port and not wait_s:
            with suppress(SettingsError), _listen(settings, "worker_metrics_port", 0) as probe:
                settings = replace(settings, worker_metrics_port=probe.getsockname()[1])
        file = settings.database if settings.demo else None
        demo = file if isinstance(file, Path) and not file.exists() else None
        if demo is None:
            migrate(settings.database)
        servers, settings = stack.enter_context(_servers(settings))
        # Children get the servers from the environment, commands from the file that `_announced` writes.
        names = ("port", "worker_metrics_port", "cache_url", "queue_url", "drain_s")
        changed = {PREFIX + name.upper(): str(getattr(settings, name)) for name in names}
        kept = {name: value for name, value in os.environ.items() if name.removesuffix(FILE) not in changed}
        stack.enter_context(_announced(settings))
        if demo is not None and not _load_demo(settings, demo, stop):
            return 0
        greet, environment = partial(_greet, settings), {**kept, **changed}
        return _keep_running(settings, listener, environment, stop, restart, greet, others=["worker"], servers=servers)


def supervise_api(settings: Settings) -> int:
    """Run several API processes until SIGINT, SIGTERM or SIGHUP; return the exit code."""
    settings.require_safe_binding()
    settings.require_servers()
    stop, restart = _signals()
    listener = listening_socket(settings.host, settings.port)
    ready = f"{settings.processes} API processes are ready; `kill -USR2 {os.getpid()}` restarts them one by one"
    return _keep_running(settings, listener, dict(os.environ), stop, restart, partial(say, ready))


def _signals() -> tuple[threading.Event, threading.Event]:
    """Events that are set by signals: stop (SIGINT, SIGTERM and SIGHUP) and restart (SIGUSR2)."""
    stop, restart = threading.Event(), threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGUSR2, lambda *_: restart.set())
    return stop, restart


def _listen(settings: Settings, name: str, wait_s: float) -> socket.socket:
    """Listen on the port that the setting `name` contains. If the port is taken, wait for up to `wait_s` seconds. If
    `wait_s` is 0 and no environment variable sets the port, try the next 99 ports. Raises `SettingsError`."""
    port, variable = getattr(settings, name), PREFIX + name.upper()
    fixed = wait_s > 0 or variable in os.environ
    others = () if fixed else range(port + 1, min(port + 100, 65_536))
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return listening_socket(settings.host, port)
        except SettingsError:
            if time.monotonic() < deadline:
                time.sleep(CHECK_S)
                continue
            for other in others:
                with suppress(SettingsError):
                    found = listening_socket(settings.host, other)
                    say(f"port {port} is taken; using {other} for {variable}")
                    return found
            raise


def _keep_running(
    settings: Settings,
    listener: socket.socket,
    environment: dict[str, str],
    stop: threading.Event,
    restart: threading.Event,
    greet: Callable[[], None],
    *,
    others: Sequence[str] = (),
    servers: Sequence[EmbeddedServer] = (),
) -> int:
    """Run the API processes, the commands in `others` and the servers until `stop` is set; return the exit code.

    The first process starts alone, so that an error that concerns all of them is printed once. `greet` is called when
    all are ready. Whenever `restart` is set, the processes are replaced one by one.
    """
    children = list[Child]()
    for place in range(settings.processes):
        port = settings.metrics_port and settings.metrics_port + place
        own = {**environment, PREFIX + "PROCESSES": "1", PREFIX + "METRICS_PORT": str(port)}
        children.append(Child("serve", own, listener, STOP_S + settings.drain_s))
    children += [Child(name, environment) for name in others]
    replacing: Generator[None, None, None] | None = None
    code: int | None = None
    greeted = False
    try:
        while code is None and not stop.wait(CHECK_S):
            for server in servers:
                if not server.running():
                    _restart(server, stop)
            watched = children if children[0].ready else children[:1]
            code = next((found for child in watched if (found := child.check()) is not None), None)
            if not greeted and all(child.ready for child in children):
                greeted = True
                greet()
            if replacing is None and greeted and restart.is_set():
                restart.clear()
                replacing = replace_one_by_one(children)
            if replacing is not None and next(replacing, True):
                replacing = None
    finally:
        _stop(children, listener, settings.drain_s)
        if replacing is not None:
            replacing.close()
    say("stopped")
    return code or 0


def _stop(children: list[Child], listener: socket.socket, drain_s: float) -> None:
    for child in children:
        child.ask_to_stop()
    drained = time.monotonic() + drain_s
    while time.monotonic() < drained and any(child.running() for child in children):
        time.sleep(CHECK_S)
    drop_new_connections(listener)  # the processes still accept the connections that are queued
    for child in children:
        child.stop()
    listener.close()


def _restart(server: EmbeddedServer, stop: threading.Event) -> None:
    say(f"the embedded server on {server.socket_path.name} died; restarting it", level="warning")
    try:
        server.start()
    except CacheUnavailable as error:  # the service goes on without it, degraded
        fail(error)
        stop.wait(SERVER_RETRY_S)


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
            raise Unavailable(f"`profiles up` is already running on {directory}") from error
        yield


def _load_demo(settings: Settings, database: Path, stop: threading.Event) -> bool:
    """Create the database with the demonstration set, in a file that is renamed at the end. Return False if stopped."""
    from app.cli.events import load_demo

    say("loading the demonstration set: 1,000 users, 90 days ...")
    part = database.with_name(database.name + ".part")
    _delete(part)
    migrate(part)
    count = asyncio.run(load_demo(replace(settings, database=part), 1_000, 90, 1, stop.is_set))
    if stop.is_set():
        say("stopped; the next `profiles up` starts loading again")
        return False
    part.rename(database)
    _delete(part)
    say(f"{count:,} events stored")
    return True


def _delete(part: Path) -> None:
    for file in part.parent.glob(f"{glob.escape(part.name)}*"):
        file.unlink()


@contextmanager
def _servers(settings: Settings) -> Iterator[tuple[list[EmbeddedServer], Settings]]:
    """Start a server for the cache or queue if its URL is not set; yield them, and settings with both URLs."""
    directory = settings.directory.resolve() / "run"
    directory.mkdir(parents=True, exist_ok=True)
    started: list[EmbeddedServer] = []
    with ExitStack() as stack:
        sockets = stack.enter_context(_socket_directory(directory))
        for name, options in (("cache", cache_options(settings.embedded_cache_mb)), ("queue", QUEUE_OPTIONS)):
            if getattr(settings, f"{name}_url") is None:
                server = EmbeddedServer(directory / name, sockets / f"{name}.sock", options)
                server.take_over()
                server.start()
                stack.callback(server.stop)
                started.append(server)
                url: dict[str, Any] = {f"{name}_url": server.url}
                settings = replace(settings, **url)
        yield started, settings


@contextmanager
def _socket_directory(preferred: Path) -> Iterator[Path]:
    """The `preferred` directory, or a temporary one if paths of sockets in it would exceed the system's limit."""
    if len(str(preferred / "cache.sock")) <= SOCKET_PATH_LIMIT:
        yield preferred
        return
    with tempfile.TemporaryDirectory(prefix="profiles-") as short:
        yield Path(short)


@contextmanager
def _announced(settings: Settings) -> Iterator[None]:
    file, urls = running_servers(settings), {"cache_url": settings.cache_url, "queue_url": settings.queue_url}
    file.write_text(json.dumps({"pid": os.getpid(), **urls}))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _greet(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base = f"http://{host}:{settings.port}"
    if settings.log_format == "json":
        say(f"Up. {base}")
        return
    user = "user-0001" if settings.demo and isinstance(settings.database, Path) else "ada"
    names = ", ".join(f"{key.name} ({'/'.join(sorted(key.scopes))})" for key in settings.api_keys)
    intro = f"in another terminal, with KEY set to one of your keys: {names}" if names else "in another terminal"
    curl = """curl -H "X-API-Key: $KEY\"""" if names else "curl"
    click.echo(
        f"""
Up. Try, {intro}:

  {curl} {base}/profiles/{user}
  {curl} -H 'Content-Type: application/json' {base}/events -d '{{"subject": "signals.tip.feedback",
    "event_id": "try-1", "user_id": "{user}", "tip_id": "tip-1", "action": "completed",
    "occurred_at": "'$(date -u +%Y-%m-%dT%H:%M:%SZ)'"}}'
  {curl} {base}/profiles/{user}

  {base}/admin    pages for admins
  {base}/schema   the API        {base}/readyz   its state        Ctrl-C stops everything
""",
        err=True,
    )
