"""Commands that run the service: up, serve, worker, migrate."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import click

from app.cli.common import json_option, print_json, say, settings_from_environment
from app.cli.port import require_free_port
from app.settings import Settings

PARENT_CHECK_S = 0.2
PARENT_GRACE_S = 15.0


processes_option = click.option(
    "--processes", type=click.IntRange(1, 64), help="API processes that share the port, instead of PROFILES_PROCESSES."
)
with_parent_option = click.option("--with-parent", type=int, hidden=True, help="Stop when this process is gone.")
ready_option = click.option("--ready-pipe", type=int, hidden=True, help="The descriptor on which to report readiness.")


@click.command()
@processes_option
def up(processes: int | None) -> None:
    """Run everything on this machine: cache, queue, API and worker. Ctrl-C stops it.

    The database is migrated first; a new one is filled with a demonstration set, unless PROFILES_DEMO=0. Embedded
    servers are started if PROFILES_CACHE_URL or PROFILES_QUEUE_URL is not set. SIGUSR2 restarts the API processes and
    the worker one by one.
    """
    from app.cli.supervisor import supervise

    sys.exit(supervise(_with_processes(processes)))


@click.command()
@processes_option
@click.option("--listener", type=int, hidden=True, help="The descriptor of the listening socket of a supervisor.")
@with_parent_option
@ready_option
def serve(processes: int | None, listener: int | None, with_parent: int | None, ready_pipe: int | None) -> None:
    """Serve the HTTP API in one or several processes on one port.

    Several processes are supervised: one that dies is replaced, and SIGUSR2 restarts them one by one without a failed
    request, with the code that is then installed.
    """
    with _collector_off():
        settings = _with_processes(processes)
        if settings.processes == 1:
            from app.asgi import run

            _follow_parent(with_parent)
            if listener is None:
                require_free_port(settings)
                run(settings)
            else:
                run(settings, partial(_report_ready, ready_pipe), _inherited(listener))
            return
    from app.cli.supervisor import supervise_api

    sys.exit(supervise_api(settings))


@click.command()
@with_parent_option
@ready_option
def worker(with_parent: int | None, ready_pipe: int | None) -> None:
    """Run a worker: consume events, rebuild and check profiles, delete old data."""
    from app.worker import run

    _follow_parent(with_parent)
    run(settings_from_environment(), on_ready=partial(_report_ready, ready_pipe))


@click.command()
@json_option
def migrate(as_json: bool) -> None:
    """Create the database, or migrate it to the schema revision of this program."""
    from app.stores.migrate import migrate as migrate_database

    settings = settings_from_environment()
    before, after = migrate_database(settings.database)
    if as_json:
        print_json({"database": str(settings.database), "from": before, "to": after})
    elif before == after:
        say(f"{settings.database} is already at revision {after}")
    else:
        say(f"{settings.database} migrated from {before or 'nothing'} to revision {after}")


@contextmanager
def _collector_off() -> Iterator[None]:
    """Switch Python's cycle collector off while the service starts, and on when the block ends. The collector
    ran 160 times, took a sixth of the start and found little. `app.asgi.tune_collector` switches it on earlier, as soon
    as the service is ready."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _with_processes(processes: int | None) -> Settings:
    settings = settings_from_environment()
    return settings if processes is None else replace(settings, processes=processes)


def _inherited(descriptor: int) -> socket.socket:
    """The socket of this descriptor, which processes that this one starts do not inherit. It must not block: of several
    processes that see a connection, one gets it, and the others would wait in `accept` instead of serving."""
    os.set_inheritable(descriptor, False)
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)
    return listener


def _report_ready(pipe: int | None) -> None:
    if pipe is not None:
        with suppress(BrokenPipeError):  # the parent is gone, and this process is about to stop
            os.write(pipe, b".")
        os.close(pipe)


def _follow_parent(parent: int | None) -> None:
    """Send this process SIGTERM when the process with the id `parent` is gone; None: do nothing. The parent passes its
    id on the command line, because `getppid()` would return another id if the parent is gone already."""
    if parent is None:
        return

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(PARENT_CHECK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        pause.wait(PARENT_GRACE_S)
        os._exit(1)  # no parent is left to kill us if we do not stop

    threading.Thread(target=watch, daemon=True, name="follow-parent").start()
