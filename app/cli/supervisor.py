"""`profiles up`: runs embedded servers, the API and a worker until Ctrl-C.

It starts in the order lock, migration, servers, demonstration set, children, and stops in the reverse order, so that
every process stops before the servers that it uses. Invariant: when `supervise` returns, nothing it started is running.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import click

from app.cli.child import Child
from app.cli.common import as_json_lines, fail, run, running_servers, say, with_running_servers
from app.cli.port import next_free_port, require_free_port
from app.errors import CacheUnavailable, SettingsError, Unavailable
from app.settings import PREFIX, Settings
from app.stores.sqlite.migrate import migrate
from app.stores.valkey.embedded import EmbeddedServer, cache_options, queue_options

CHECK_S = 0.1
CHILDREN_STOP_S = 20.0
SERVER_RETRY_S = 2.0
SOCKET_PATH_LIMIT = 100
CHILDREN = ("serve", "worker")


def supervise(settings: Settings) -> int:
    """Run the servers, the API and a worker until SIGINT, SIGTERM or SIGHUP (terminal closed); return the exit code."""
    settings.require_safe_binding()
    settings.require_whole_model()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with _only_one(settings.database.parent):
        killed = running_servers(settings.database).exists()  # an earlier `up` was killed; its children are stopping
        settings = _with_free_ports(settings, wait=killed)
        require_free_port(settings, CHILDREN_STOP_S if killed else 0)
        with_demo = settings.demo and not settings.database.exists()
        if not with_demo:
            migrate(settings.database)
        with _servers(settings) as (servers, cache_url, queue_url):
            # Children get the servers from the environment, commands from the file that `_announced` writes.
            environment = {
                **os.environ,
                PREFIX + "DATABASE": str(settings.database),
                PREFIX + "PORT": str(settings.port),
                PREFIX + "WORKER_METRICS_PORT": str(settings.worker_metrics_port),
                PREFIX + "CACHE_URL": cache_url,
                PREFIX + "QUEUE_URL": queue_url,
                PREFIX + "DRAIN_S": "0",  # no balancer: Ctrl-C should stop at once
            }
            with _announced(settings.database, cache_url, queue_url):
                if with_demo and not _load_demo(settings, stop):
                    return 0
                return _keep_running(settings, servers, environment, stop)


def _with_free_ports(settings: Settings, *, wait: bool) -> Settings:
    """The settings with free ports in place of taken ones. A port that is set in the environment is not replaced. With
    `wait`, no port is replaced, because processes of an earlier `up` are about to free theirs."""

    def free(variable: str, port: int, excluded: int = 0) -> int:
        if wait or not port or PREFIX + variable in os.environ:
            return port
        found = next_free_port(settings.host, port, excluded)
        if found != port:
            say(f"port {port} is taken; using {found} for {PREFIX}{variable}")
        return found

    served = replace(settings, port=free("PORT", settings.port))
    return replace(served, worker_metrics_port=free("WORKER_METRICS_PORT", settings.worker_metrics_port, served.port))


def _keep_running(
    settings: Settings, servers: list[EmbeddedServer], environment: dict[str, str], stop: threading.Event
) -> int:
    children = [Child(name, environment) for name in CHILDREN]
    code, greeted = 0, False
    try:
        for child in children:
            child.start()
        while not stop.wait(CHECK_S):
            for server in servers:
                if not server.running():
                    _restart(server, stop)
            codes = [found for child in children if (found := child.check()) is not None]
            if codes:
                code = codes[0]
                break
            if not greeted and _api_answers(settings) and _worker_answers(settings):
                greeted = True
                _greet(settings)
    finally:
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop()
    say("stopped")
    return code


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


def _load_demo(settings: Settings, stop: threading.Event) -> bool:
    """Create the database with the demonstration set, in a file that is renamed at the end. Return False if stopped."""
    from app.cli.change import load_demo

    say("loading the demonstration set: 1,000 users, 90 days ...")
    part = settings.database.with_name(settings.database.name + ".part")
    _delete(part)
    migrate(part)
    count = run(load_demo(with_running_servers(replace(settings, database=part)), 1_000, 90, 1, stop.is_set))
    if stop.is_set():
        say("stopped; the next `profiles up` starts loading again")
        return False
    part.rename(settings.database)
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
    """The `preferred` directory, or a temporary one if paths of sockets in it would exceed the system's limit."""
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


def _api_answers(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=1)
    with suppress(OSError, http.client.HTTPException), closing(connection):
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    return False


def _worker_answers(settings: Settings) -> bool:
    """Whether the worker listens on its metrics port, or has none. From then on, another `up` avoids that port."""
    if not settings.worker_metrics_port:
        return True
    with suppress(OSError), closing(socket.create_connection((settings.host, settings.worker_metrics_port), 1)):
        return True
    return False


def _greet(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base = f"http://{host}:{settings.port}"
    if as_json_lines():
        say(f"Up. {base}")
        return
    user = "user-0001" if settings.demo else "ada"
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
