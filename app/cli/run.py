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

from app.cli.output import print_json, say, settings_from_environment
from app.cli.port import require_free_port

PARENT_LOOK_S = 0.2
PARENT_GRACE_S = 15.0


@click.command()
def up() -> None:
    """Run everything on this machine: migrate, cache, queue, API, worker. Ctrl-C stops it.

    Needs nothing but Python. Where PROFILES_CACHE_URL and PROFILES_QUEUE_URL are not set, it starts two embedded
    servers. A new database is filled with a demonstration set (PROFILES_DEMO=0 leaves it empty).
    """
    from app.cli.supervisor import supervise

    sys.exit(supervise(settings_from_environment()))


@click.command()
@click.option("--with-parent", type=int, hidden=True, help="Stop when this process, which started us, is gone.")
def serve(with_parent: int | None) -> None:
    """Serve the HTTP API. More processes are more capacity."""
    with _collector_off():
        from app.asgi import run

        _follow_parent(with_parent)
        settings = settings_from_environment()
        settings.require_safe_binding()
        settings.require_servers()
        settings.require_whole_model()
        require_free_port(settings)
        run(settings)


@click.command()
@click.option("--with-parent", type=int, hidden=True, help="Stop when this process, which started us, is gone.")
def worker(with_parent: int | None) -> None:
    """Work on the queue: take in events, consume them, rebuild, sweep, prune."""
    from app.worker import run

    _follow_parent(with_parent)
    run(settings_from_environment())


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def migrate(as_json: bool) -> None:
    """Create the database, or bring it to this program's revision."""
    from app.stores.sqlite.migrate import migrate as bring

    settings = settings_from_environment()
    before, after = bring(settings.database)
    if as_json:
        print_json({"database": str(settings.database), "from": before, "to": after})
    elif before == after:
        say(f"{settings.database} is at revision {after} already")
    else:
        say(f"{settings.database} migrated from {before or 'nothing'} to revision {after}")


@contextmanager
def _collector_off() -> Iterator[None]:
    """What is made while starting is there to stay: the cycle collector would look through it 160 times, in vain.

    That took a sixth of the start. `app.asgi.tune_collector` switches it on when the service is ready.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _follow_parent(parent: int | None) -> None:
    """Stop, as on SIGTERM, when the process that started this one is gone (it may have been killed).

    Its id is handed down: asked for here, it would be another's where the parent is gone already.
    """
    if parent is None:
        return

    def watch() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(PARENT_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        pause.wait(PARENT_GRACE_S)
        os._exit(1)  # no parent is left to kill a process that ignores SIGTERM

    threading.Thread(target=watch, daemon=True, name="follow-parent").start()
