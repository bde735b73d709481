"""`profiles up`: runs embedded servers, the API and a worker until Ctrl-C. `profiles serve --processes N`: runs N API
processes on one port.

The supervisor locks the data directory, migrates the database, starts the servers, stores the demonstration events and
starts the child processes, in this order. It stops them in the reverse order, so that every process stops before the
servers that it uses. Invariant: when `supervise` returns, nothing it started is running.

The supervisor opens the listening socket, and the API processes accept from it (`app/README.md` says why).
"""

from __future__ import annotations

import fcntl
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

import click

from app.cli.child import STOP_S, Child, replace_one_by_one
from app.cli.common import as_json_lines, fail, run, running_servers, say, with_running_servers
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
    with _only_one(settings.directory):
        killed = running_servers(settings).exists()  # an earlier `up` was killed; its children are stopping
        settings = _with_free_ports(settings, wait=killed)
        _require_free_port(settings, CHILDREN_STOP_S if killed else 0)
        file = settings.database if settings.demo and isinstance(settings.database, Path) else None
        demo = file if file is not None and not file.exists() else None
        if demo is None:
            migrate(settings.database)
        with _servers(settings) as (servers, cache_url, queue_url):
            # Children get the servers from the environment, commands from the file that `_announced` writes.
            changed = {
                PREFIX + "PORT": str(settings.port),
                PREFIX + "WORKER_METRICS_PORT": str(settings.worker_metrics_port),
                PREFIX + "CACHE_URL": cache_url,
                PREFIX + "QUEUE_URL": queue_url,
                PREFIX + "DRAIN_S": "0",  # no balancer: Ctrl-C should stop at once
            }
            kept = {name: value for name, value in os.environ.items() if name.removesuffix(FILE) not in changed}
            environment = {**kept, **changed}
            with _announced(settings, cache_url, queue_url):
                if demo is not None and not _load_demo(settings, demo, stop):
                    return 0
                settings = replace(settings, drain_s=0)
                greet = partial(_greet, settings)
                return _keep_running(settings, environment, stop, restart, greet, others=["worker"], servers=servers)


def supervise_api(settings: Settings) -> int:
    """Run several API processes until SIGINT, SIGTERM or SIGHUP; return the exit code."""
    settings.require_safe_binding()
    settings.require_servers()
    stop, restart = _signals()

    def greet() -> None:
        say(f"{settings.processes} API processes are ready; `kill -USR2 {os.getpid()}` restarts them one by one")

    return _keep_running(settings, dict(os.environ), stop, restart, greet)


def _signals() -> tuple[threading.Event, threading.Event]:
    """Events that are set by signals: stop (SIGINT, SIGTERM and SIGHUP) and restart (SIGUSR2)."""
    stop, restart = threading.Event(), threading.Event()
    for number in stop_signals():
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGUSR2, lambda *_: restart.set())
    return stop, restart


def _with_free_ports(settings: Settings, *, wait: bool) -> Settings:
    """The settings with free ports in place of taken ones. A port that is set in the environment is not replaced. With
    `wait`, no port is replaced, because processes of an earlier `up` are about to free theirs."""

    def free(variable: str, port: int, excluded: int = 0) -> int:
        if wait or not port or PREFIX + variable in os.environ:
            return port
        found = _next_free_port(settings.host, port, excluded)
        if found != port:
            say(f"port {port} is taken; using {found} for {PREFIX}{variable}")
        return found

    served = replace(settings, port=free("PORT", settings.port))
    return replace(served, worker_metrics_port=free("WORKER_METRICS_PORT", settings.worker_metrics_port, served.port))


def _next_free_port(host: str, port: int, excluded: int) -> int:
    """The first free port from `port` on, except `excluded`; `port` itself if the next hundred are all taken."""
    for candidate in range(port, min(port + 100, 65_536)):
        with suppress(SettingsError):
            listening_socket(host, candidate).close()
            if candidate != excluded:
                return candidate
    return port


def _require_free_port(settings: Settings, wait_s: float) -> None:
    """Raise `SettingsError` if PROFILES_PORT is still taken after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return listening_socket(settings.host, settings.port).close()
        except SettingsError:
            if time.monotonic() > deadline:
                raise
        time.sleep(CHECK_S)


def _keep_running(
    settings: Settings,
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
    with listening_socket(settings.host, settings.port) as listener:
        children = list[Child]()
        for place in range(settings.processes):
            port = settings.metrics_port and settings.metrics_port + place
            own = {**environment, PREFIX + "PROCESSES": "1", PREFIX + "METRICS_PORT": str(port)}
            children.append(Child("serve", own, listener, STOP_S + settings.drain_s))
        children += [Child(name, environment) for name in others]
        replacing: Generator[None, None, None] | None = None
        code, greeted = 0, False
        try:
            while not stop.wait(CHECK_S):
                for server in servers:
                    if not server.running():
                        _restart(server, stop)
                watched = children if children[0].ready else children[:1]
                codes = [found for child in watched if (found := child.check()) is not None]
                if codes:
                    code = codes[0]
                    break
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
    return code


def _stop(children: list[Child], listener: socket.socket, drain_s: float) -> None:
    for child in children:
        child.ask_to_stop()
    drained = time.monotonic() + drain_s
    while time.monotonic() < drained and any(child.running() for child in children):
        time.sleep(CHECK_S)
    drop_new_connections(listener)  # the processes still accept those that wait
    for child in children:
        child.stop()


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
    from app.cli.change import load_demo

    say("loading the demonstration set: 1,000 users, 90 days ...")
    part = database.with_name(database.name + ".part")
    _delete(part)
    migrate(part)
    count = run(load_demo(with_running_servers(replace(settings, database=part)), 1_000, 90, 1, stop.is_set))
    if stop.is_set():
        say("stopped; the next `profiles up` starts loading again")
        return False
    part.rename(database)
    _delete(part)
    say(f"{count:,} events stored")
    return True


def _delete(part: Path) -> None:
    for file in part.parent.iterdir():
        if file.name.startswith(part.name):
            file.unlink()


@contextmanager
def _servers(settings: Settings) -> Iterator[tuple[list[EmbeddedServer], str, str]]:
    """Start a server for the cache or queue if its URL is not set; yield the started servers and the URLs of both."""
    directory = settings.directory.resolve() / "run"
    directory.mkdir(parents=True, exist_ok=True)
    started: list[EmbeddedServer] = []
    urls: list[str] = []
    with ExitStack() as stack:
        sockets = stack.enter_context(_socket_directory(directory))
        for name, url, options in (
            ("cache", settings.cache_url, cache_options(settings.embedded_cache_mb)),
            ("queue", settings.queue_url, QUEUE_OPTIONS),
        ):
            if url is None:
                server = EmbeddedServer(directory / name, sockets / f"{name}.sock", options)
                server.take_over()
                server.start()
                stack.callback(server.stop)
                started.append(server)
                url = server.url  # noqa: PLW2901  # of the server that was started instead
            urls.append(url)
        yield started, urls[0], urls[1]


@contextmanager
def _socket_directory(preferred: Path) -> Iterator[Path]:
    """The `preferred` directory, or a temporary one if paths of sockets in it would exceed the system's limit."""
    if len(str(preferred / "cache.sock")) <= SOCKET_PATH_LIMIT:
        yield preferred
        return
    with tempfile.TemporaryDirectory(prefix="profiles-") as short:
        yield Path(short)


@contextmanager
def _announced(settings: Settings, cache_url: str, queue_url: str) -> Iterator[None]:
    file = running_servers(settings)
    file.write_text(json.dumps({"pid": os.getpid(), "cache_url": cache_url, "queue_url": queue_url}))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _greet(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base = f"http://{host}:{settings.port}"
    if as_json_lines():
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
