"""Commands that run the service: up, serve, worker."""

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import click

from app.cli.common import settings_from_environment

GRACE_S = 15.0
processes_option = click.option(
    "--processes", type=click.IntRange(1, 64), help="API processes that share the port. Default: PROFILES_PROCESSES."
)
supervisor_option = click.option("--supervisor", type=int, hidden=True, help="Descriptor of a socket to the parent.")


@click.command()
@processes_option
def up(processes: int | None) -> None:
    """Run everything on this machine: cache, queue, API and worker. Ctrl-C stops it.

    The database is migrated first; a new one is filled with a demonstration set, unless PROFILES_DEMO=0. Embedded
    servers are started if PROFILES_CACHE_URL or PROFILES_QUEUE_URL is not set. SIGUSR2 restarts the API processes and
    the worker one by one.
    """
    from app.cli.supervisor import supervise

    sys.exit(supervise(settings_from_environment(processes)))


@click.command()
@processes_option
@click.option("--listener", type=int, hidden=True, help="The descriptor of the listening socket of a supervisor.")
@supervisor_option
def serve(processes: int | None, listener: int | None, supervisor: int | None) -> None:
    """Serve the HTTP API in one or several processes on one port.

    Several processes are supervised: one that dies is replaced, and SIGUSR2 restarts them one by one without a failed
    request, with the code that is then installed.
    """
    # Python's cycle collector ran 160 times during the start, took a sixth of it and found little.
    # `app.asgi.tune_collector` switches it on as soon as the service is ready.
    gc.disable()
    try:
        settings = settings_from_environment(processes)
        if settings.processes == 1:
            from app.asgi import run

            run(settings, _supervised(supervisor), _inherited(listener))
            return
    finally:
        gc.enable()
    from app.cli.supervisor import supervise_api

    sys.exit(supervise_api(settings))


@click.command()
@supervisor_option
def worker(supervisor: int | None) -> None:
    """Run a worker: consume events, rebuild and check profiles, delete old data."""
    from app.worker import run

    report_ready = _supervised(supervisor)
    run(settings_from_environment(), on_ready=lambda _: report_ready())


def _inherited(descriptor: int | None) -> socket.socket | None:
    """Open the listening socket that was inherited as this descriptor; child processes will not inherit it. The socket
    must not block: several processes wake up for one connection, and all but one would hang in `accept`."""
    if descriptor is None:
        return None
    os.set_inheritable(descriptor, False)
    listener = socket.socket(fileno=descriptor)
    listener.setblocking(False)
    return listener


def _supervised(descriptor: int | None) -> Callable[[], None]:
    """Connect to the supervisor by the inherited socket with this descriptor. When the supervisor ends, the socket is
    closed, and this process sends itself SIGTERM. Return a function that tells the supervisor that this process is
    ready. Without a supervisor (None), the function does nothing."""
    if descriptor is None:
        return lambda: None
    link = socket.socket(fileno=descriptor)

    def watch() -> None:
        with suppress(OSError):
            link.recv(1)  # the supervisor sends nothing
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(1)  # no supervisor is left to kill us if we do not stop

    def report_ready() -> None:
        with suppress(OSError):  # the supervisor is gone, and this process is about to stop
            link.send(b".")

    threading.Thread(target=watch, daemon=True, name="supervised").start()
    return report_ready
