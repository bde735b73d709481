"""Serves the ASGI application with granian, in this process and event loop, until a signal arrives.

Invariants: `listen` returns at most `drain_s` + `STOP_GRACE_S` seconds after the signal, whatever clients do. Within
that time, every request that arrived in full is answered; `_wind_down` describes how.

granian cannot end a connection whose peer reads nothing or is gone. Linux ends it after `listener.UNTAKEN_S` seconds.
"""

import asyncio
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

import msgspec
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.net import SocketHolder  # type: ignore[attr-defined]  # it is not exported explicitly
from granian.server.embed import Server
from litestar import Litestar
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from app.api.operations import STOPPING
from app.concurrency.tasks import stop_signals
from app.listener import BACKLOG, HAND_OVER_S, accept_queue_length, drop_new_connections, stop_accepting
from app.settings import Settings
from app.telemetry import logger

# The most connections at once; more wait in the backlog. Higher than the number of requests that the edge admits, so
# that a probe or an admin can connect while clients hold idle connections.
CONNECTIONS = 4096
FILES_LEFT = 128  # file descriptors for the database, the cache and the log
# From the start of the connection, or the last response, to the end of the next head.
KEEP_ALIVE_S = 75
HEAD_BYTES = 64 * 1024  # granian rejects a head of twice this size with 431, and more than 100 headers
# Seconds after the drain: when running computations are interrupted, and when connections are cut. The other half
# second of the promised five is for closing.
OVERDUE_S = 3.0
STOP_GRACE_S = 4.5
# During shutdown: wait until no request begins for QUIET_S, at most LINGER_S.
QUIET_S = 0.1
LINGER_S = 1.0
QUEUE_STEPS, QUEUE_STEP_S = 250, 0.002
log = logger("api")


async def listen(
    application: Litestar,
    listener: socket.socket,
    settings: Settings,
    *,
    shared: bool,
    on_ready: Callable[[], None],
    on_overdue: Callable[[], None],
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then close the socket.

    `on_ready` is called once signals are handled instead of killing the process. After the signal, `/readyz` answers
    503. For `drain_s` seconds, requests are served as before, so that load balancers can see this answer. If requests
    still run `OVERDUE_S` seconds after that, `on_overdue` is called; it must interrupt them, so that they are answered
    with an error before their connections are cut.

    If the socket is `shared` with other processes, SIGUSR2 makes this process hand over to them: `/readyz` stays as it
    is, and running requests are interrupted `HAND_OVER_S` seconds later than after SIGTERM. A process that has the
    socket to itself ignores SIGUSR2.
    """
    with listener:
        loop, drain_s = asyncio.get_running_loop(), settings.drain_s
        server = GranianServer(application, listener, head_s=settings.keep_alive_s)
        serving = loop.create_task(server.serve())
        stopping: list[asyncio.Task[None] | asyncio.TimerHandle] = []

        def stop(*, handing_over: bool = False) -> None:
            if not stopping:
                about_to_stop(application, handing_over=handing_over)
                steps = _wind_down(application, listener, server, drain_s, shared=shared, handing_over=handing_over)
                stopping.append(loop.create_task(steps))
            # A later SIGTERM shortens a handing over.
            wait_s = drain_s + (HAND_OVER_S if handing_over else 0)
            stopping.append(loop.call_later(wait_s + OVERDUE_S, on_overdue))
            # granian waits for the last request without limit: for a client that stalls in its body, forever.
            stopping.append(loop.call_later(wait_s + STOP_GRACE_S, serving.cancel))

        def restart() -> None:
            if shared:
                stop(handing_over=True)
            else:
                log.warning("restart_ignored", detail="only `profiles serve` with several processes restarts them")

        for number in stop_signals():
            loop.add_signal_handler(number, stop)
        loop.add_signal_handler(signal.SIGUSR2, restart)
        on_ready()
        await asyncio.wait({serving})
        for step in stopping:
            step.cancel()
        if serving.cancelled():
            log.warning("requests_cut_short", after_s=STOP_GRACE_S)
        else:
            serving.result()


def about_to_stop(application: Litestar, *, handing_over: bool = False) -> None:
    """Begin the shutdown: from now on no language model is called. `/readyz` answers 503, unless the process is
    `handing_over` to others on the same port."""
    application.state[STOPPING] = not handing_over
    if (tips := application.state.get("tips")) is not None:
        tips.stop()


class GranianServer(Server):
    """A granian server on a listening socket that we opened. granian duplicates the socket and closes the duplicate."""

    def __init__(self, application: ASGIApp, listener: socket.socket, *, head_s: float = KEEP_ALIVE_S) -> None:
        super().__init__(
            application,
            interface=Interfaces.ASGI,
            http=HTTPModes.http1,
            websockets=False,
            backlog=BACKLOG,
            backpressure=connections(),
            http1_settings=HTTP1Settings(header_read_timeout=int(head_s * 1000), max_buffer_size=HEAD_BYTES),
            log_enabled=False,
        )
        self._listener = listener

    def _init_shared_socket(self) -> None:
        # The type stubs of granian lack the arguments.
        self._shd = SocketHolder(self._listener.dup().detach(), False, BACKLOG)  # type: ignore[call-arg,assignment]


def connections() -> int:
    """The most connections to accept: `CONNECTIONS`, or fewer if the limit of open files cannot be raised enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + FILES_LEFT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(FILES_LEFT, min(CONNECTIONS, soft - FILES_LEFT))


class LastAnswers(msgspec.Struct, eq=False):
    """ASGI middleware during shutdown: every response closes its connection."""

    inner: ASGIApp
    _begun: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._begun += 1

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.inner(scope, receive, send_last)

    async def quiet(self) -> None:
        """Wait until no request has begun for `QUIET_S` seconds, but at most `LINGER_S` seconds."""
        loop = asyncio.get_running_loop()
        until, seen = loop.time() + LINGER_S, -1
        while seen != self._begun and loop.time() < until:
            seen = self._begun
            await asyncio.sleep(QUIET_S)


async def _wind_down(
    application: Litestar, listener: socket.socket, server: Server, drain_s: float, *, shared: bool, handing_over: bool
) -> None:
    """Stop in three steps after `drain_s` seconds, so that no request that was sent is lost. A process that hands over
    serves its open connections for `drain_s` seconds, but at least `LINGER_S`, while others accept new ones.

    1. Close every connection after its next response. This prevents: (a) a client sends its next request; (b) we close
       the connection; (c) the client sees a reset and cannot know whether the request was carried out.
    2. Drop new connections, and wait until the accept queue is empty and no further request begins. This prevents:
       (a) a client connects and sends a request; (b) we close the listening socket with its queue, or the accepted
       connection before we read the request; (c) the client sees a reset. If the socket is `shared`, this process only
       stops accepting; the supervisor, which knows whether all processes stop, drops the new connections.
    3. Close the listening socket. From now on, clients are refused and connect elsewhere. Clients that were dropped in
       step 2 retry after a second.
    """
    if handing_over:
        stop_accepting(listener)
    else:
        await asyncio.sleep(drain_s)
    application.asgi_handler = last = LastAnswers(application.asgi_handler)
    if handing_over:
        await asyncio.sleep(max(drain_s, LINGER_S))
    await last.quiet()
    if not handing_over and (shared or drop_new_connections(listener)):
        for _ in range(QUEUE_STEPS):
            if not accept_queue_length(listener):
                break
            await asyncio.sleep(QUEUE_STEP_S)
        if shared:
            stop_accepting(listener)
        await last.quiet()
    listener.close()
    server.stop()  # type: ignore[no-untyped-call]  # granian is untyped
