"""Commands that run the service: up, serve, worker, migrate."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from app.cli.common import json_option, print_json, say, settings_from_environment
from app.cli.port import require_free_port

PARENT_CHECK_S = 0.2
PARENT_GRACE_S = 15.0


@click.command()
def up() -> None:
    """Run everything on this machine: cache, queue, API and worker. Ctrl-C stops it.

    The database is migrated first; a new one is filled with a demonstration set, unless PROFILES_DEMO=0. Embedded
    servers are started if PROFILES_CACHE_URL or PROFILES_QUEUE_URL is not set.
    """
    from app.cli.supervisor import supervise

    sys.exit(supervise(settings_from_environment()))


@click.command()
@click.option("--with-parent", type=int, hidden=True, help="Stop when this process is gone.")
def serve(with_parent: int | None) -> None:
    """Serve the HTTP API in one process. Start more processes for more capacity."""
    with _collector_off():
        from app.asgi import run

        _follow_parent(with_parent)
        settings = settings_from_environment()
        require_free_port(settings)
        run(settings)


@click.command()
@click.option("--with-parent", type=int, hidden=True, help="Stop when this process is gone.")
def worker(with_parent: int | None) -> None:
    """Run a worker: consume events, rebuild and check profiles, delete old data."""
    from app.worker import run

    _follow_parent(with_parent)
    run(settings_from_environment())


@click.command()
@json_option
def migrate(as_json: bool) -> None:
    """Create the database, or migrate it to the schema revision of this program."""
    from app.stores.sqlite.migrate import migrate as migrate_database

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
