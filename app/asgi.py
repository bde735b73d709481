"""The HTTP service: `create_app()` for any ASGI server, and `serve(settings)` on granian.

One process runs one event loop. To use more cores, run more processes (`profiles serve --processes N`).
"""

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import litestar_offline_docs
import uvloop
from litestar import Litestar
from litestar.types import ASGIApp

from app.api import events, operations
from app.api.auth.authentication import Authenticator, guard
from app.api.auth.sessions import Sessions
from app.api.dependencies import HttpRequest
from app.api.middleware.edge import Edge
from app.api.middleware.fast_path import FastPath, Post
from app.api.middleware.proxy_headers import BehindProxy
from app.api.middleware.rate_limit import RateLimit, TokenBuckets
from app.api.openapi import ASSETS, openapi_config, openapi_document
from app.api.problems import EXCEPTION_HANDLERS
from app.api.rendering import Renderer
from app.api.request_parsing import check_parameters
from app.api.routes import routes, static_files
from app.api.server import listen
from app.bootstrap.health import sampling
from app.bootstrap.servers import open_tip_generator
from app.bootstrap.service import OpenService, open_service
from app.concurrency.tasks import repeat, running
from app.errors import StoreUnavailable
from app.features.clock import DAY_MS, Clock, SystemClock
from app.features.contract import Contract
from app.listener import listening_socket
from app.operations.samples import EVERY_S
from app.settings import Settings
from app.stores.sql.access import SqlKeyUses, SqlSessions
from app.telemetry import configure_logging, logger, serve_metrics

COLLECT_AFTER = 20_000
DOCUMENTATION = Path(litestar_offline_docs.__file__).parent / "static"
PAGES = Path(__file__).parent / "api" / "pages" / "static"
MAX_BODY_BYTES = 8 * 1024 * 1024
log = logger("asgi")


def create_app(
    settings: Settings | None = None, *, service: OpenService | None = None, contract: Contract | None = None
) -> Litestar:
    """Create the Litestar application, by default with the settings of the environment.

    A `service` that is passed in is used and not closed. Otherwise the application opens one with `contract` (the
    feature registry and its typed Struct) when it starts, and closes it when it stops.
    """
    settings = settings or Settings.from_environment()

    @asynccontextmanager
    async def lifespan(application: Litestar) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            opened = service
            if opened is None:
                opened = await stack.enter_async_context(open_service(settings, door="http", contract=contract))
                await stack.enter_async_context(sampling(opened, "api"))
            state = application.state  # see `app.api.dependencies`
            tips = open_tip_generator(settings, opened.clock, opened.metrics)
            state.tips = await stack.enter_async_context(tips)
            state.service = opened
            state.authenticator = Authenticator(settings.api_keys)
            state.key_uses = SqlKeyUses(opened.database)
            state.renderer = Renderer(opened.registry)
            state.sessions = Sessions(
                keys=settings.api_keys,
                records=SqlSessions(opened.database),
                clock=opened.clock,
                lifetime_hours=settings.session_hours,
                cookie_name=f"profiles_session_{opened.database.id[:8]}",
            )
            application.asgi_handler = _with_middleware(application, router, opened)
            noting = partial(note_key_uses, state.authenticator, state.key_uses, opened.clock)
            await stack.enter_async_context(running(repeat("key_uses", noting, EVERY_S)))
            yield

    handlers = routes(scoring=settings.scoring)
    application = Litestar(
        route_handlers=[
            operations.options_of(handlers),
            *handlers,
            static_files(ASSETS, DOCUMENTATION),
            static_files("/admin/static", PAGES),
        ],
        lifespan=[lifespan],
        guards=[guard, check_parameters],
        exception_handlers=EXCEPTION_HANDLERS,
        openapi_config=openapi_config(root_path=settings.root_path),
        opt={"rate_limited": bool(settings.rate_limit)},
        request_class=HttpRequest,
        request_max_body_size=MAX_BODY_BYTES,
        logging_config=None,
    )
    router = application.asgi_handler
    return application


def _with_middleware(application: Litestar, router: ASGIApp, service: OpenService) -> ASGIApp:
    """Wrap the application's router in all middleware. Litestar's own middleware is not used, because the router
    decodes a path before it runs middleware."""
    settings, metrics, scoring = service.settings, service.metrics, service.scoring
    authenticator = application.state.authenticator
    checks = {
        ("POST", "/events"): ("events", lambda: service.ingestor.overloaded),
        ("POST", "/profiles/history"): ("history", service.computation.history_overloaded),
    }
    posts = [Post(("POST", "/events", 202), "write", partial(events.ingest_body, service.ingestor))]
    if scoring is not None:
        from app.api.scoring import plain_scores  # noqa: PLC0415  # it imports the bandit

        checks["POST", "/score"] = "scores", lambda: scoring.scorer.overloaded
        posts.append(Post(("POST", "/score", 200), "read", plain_scores(scoring.scorer, service.mirror)))
    edge = Edge(router, metrics, checks)
    handler: ASGIApp = FastPath(edge, service.reader, application.state.renderer, authenticator, metrics, posts)
    if settings.rate_limit:
        burst = settings.rate_burst or settings.rate_limit
        buckets = TokenBuckets(settings.rate_limit, burst, service.clock.monotonic)
        handler = RateLimit(handler, edge, buckets, authenticator, metrics)
    if (root_path := settings.root_path) or settings.trusted_proxies:
        own = {route.path.split("/")[1] for route in application.routes}
        handler = BehindProxy(handler, root_path=root_path, trusted=settings.trusted_proxies, own=own)
    return service.tracing.middleware(handler) if service.tracing is not None else handler


async def note_key_uses(authenticator: Authenticator, uses: SqlKeyUses, clock: Clock) -> None:
    """Store which API keys have been used since this function was last called. Raises `StoreUnavailable`."""
    names, authenticator.used = authenticator.used, set()
    try:
        await uses.note(names, clock.now_ms())
    except StoreUnavailable:
        authenticator.used |= names
        raise


def document(settings: Settings, contract: Contract) -> dict[str, Any]:
    """The OpenAPI document that a service with these settings and features serves. It needs no database or server."""
    day = SystemClock().now_ms() // DAY_MS
    return openapi_document(create_app(settings, contract=contract), contract.registry, contract.mirror, day)


def tune_collector() -> None:
    """Exempt the objects created at start-up from Python's cycle collector, and run the collector less often.

    Reference counts free the objects of a request; looking for cycles every 700 allocations took three to four percent
    of the time of a warm read. No collection precedes `gc.freeze`: it would find a few hundred cycles among a hundred
    thousand objects and delay the start by 35 ms. `profiles serve` keeps the collector off until this call.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 10, 10)
    gc.enable()


async def serve(
    settings: Settings, on_ready: Callable[[], None] = lambda: None, shared: socket.socket | None = None
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then shut down as `app.api.server.listen` describes.

    `shared` is a listening socket from which other processes accept, too. Without it, the process opens its own. Raises
    `ProfilesError` if the service cannot start.
    """
    settings.require_safe_binding()
    settings.require_servers()
    async with AsyncExitStack() as stack:
        # Before anything else, so that nothing is begun if the port is taken.
        listener = stack.enter_context(shared or listening_socket(settings.host, settings.port))
        service = await stack.enter_async_context(open_service(settings, door="http"))
        await stack.enter_async_context(sampling(service, "api"))
        application = create_app(settings, service=service)
        tune_collector()
        if not settings.api_keys:
            detail = "every program on this machine can read, write and administer; set PROFILES_API_KEYS"
            log.warning("no_api_keys", detail=detail, host=settings.host)
        stop_metrics = serve_metrics(service.metrics, settings.host, settings.metrics_port, "PROFILES_METRICS_PORT")
        stack.push_async_callback(asyncio.to_thread, stop_metrics)

        def interrupt() -> None:
            """Interrupt running database reads; their requests are answered with 503."""
            service.computation.stopping = True
            service.database.readers.interrupt()

        log.info("serving", url=f"http://{settings.host}:{settings.port}", database=str(settings.database))
        is_shared = shared is not None
        await listen(application, listener, settings, shared=is_shared, on_ready=on_ready, on_overdue=interrupt)


def run(settings: Settings, on_ready: Callable[[], None] = lambda: None, shared: socket.socket | None = None) -> None:
    configure_logging(settings.log_format, settings.log_level)
    uvloop.run(serve(settings, on_ready, shared))
