"""Composition root of the HTTP service: `create_app(settings)`, and `serve(settings)` on granian.

One process serves one event loop; more processes are more `profiles serve`, behind a balancer.
"""

from __future__ import annotations

import gc
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import litestar_offline_docs
import uvloop
from litestar import Litestar, Router
from litestar.exceptions import HTTPException
from litestar.static_files import create_static_files_router

from app.api import events, generation, operations, profiles, scoring
from app.api.admin.routes import ADMIN_ROUTES
from app.api.auth.authentication import Authenticator, guard
from app.api.auth.sessions import Sessions
from app.api.dependencies import Api
from app.api.middleware.edge import Edge
from app.api.middleware.fast_path import FastPath
from app.api.middleware.proxy_headers import behind_proxy
from app.api.middleware.rate_limit import RateLimit
from app.api.openapi.allowed_methods import options_of
from app.api.openapi.document import ASSETS, openapi_config
from app.api.pages.assets import pages_assets, plain_name
from app.api.problems import on_error, on_exception, on_http_exception
from app.api.request_parsing import check_query
from app.api.server import listen
from app.bootstrap.contract import Contract
from app.bootstrap.generation import open_writing
from app.bootstrap.health import gauges, readiness, refresh_gauges, sampling
from app.bootstrap.service import Service, open_service
from app.errors import CacheUnavailable, ProfilesError, QueueUnavailable
from app.events.ports import Holdings
from app.events.replay import Replayer
from app.generation.writing import Writing
from app.settings import Settings
from app.stores.sqlite.outbox import unknown_decisions
from app.stores.sqlite.sessions import SqliteSessions
from app.telemetry import Metrics, configure_logging, logger

COLLECT_AFTER = 20_000
MAX_BODY_BYTES = 8 * 1024 * 1024
log = logger("asgi")

ROUTES = [
    profiles.get_profile,
    profiles.post_batch,
    profiles.post_history,
    profiles.get_features,
    events.post_events,
    scoring.post_score,
    scoring.get_decision,
    generation.post_generate,
    *ADMIN_ROUTES,
    operations.healthz,
    operations.readyz,
    operations.metrics,
]


def create_app(
    settings: Settings | None = None, *, service: Service | None = None, contract: Contract | None = None
) -> Litestar:
    """The application, by default with the settings of the environment.

    It opens a service for its lifespan, or uses the one given, which stays open.
    """
    settings = settings or Settings.from_environment()
    shared_metrics = service.metrics if service is not None else Metrics()

    def begin(application: Litestar, service: Service, writing: Writing) -> None:
        api = application.state.api = _api(service, writing)
        hit_path.open(api.reader, api.registry, api.authenticator, api.metrics)
        if limit is not None:
            limit.open(api.authenticator, service.clock.monotonic)
        gateway.shedding.open(
            {
                ("POST", "/events"): ("events", lambda: api.ingestor.overloaded),
                ("POST", "/profiles/history"): ("history", lambda: api.reader.history_overloaded),
                ("POST", "/score"): ("scores", lambda: api.scorer.overloaded),
            }
        )

    @asynccontextmanager
    async def lifespan(application: Litestar) -> AsyncIterator[None]:
        if service is not None:
            async with open_writing(settings, service.clock, service.metrics) as writing:
                begin(application, service, writing)
                yield
            return
        async with (
            open_service(settings, door="http", contract=contract, metrics=shared_metrics) as opened,
            sampling(opened, "api"),
            open_writing(settings, opened.clock, opened.metrics) as writing,
        ):
            begin(application, opened, writing)
            yield

    application = Litestar(
        route_handlers=[*options_of(ROUTES), *ROUTES, _assets(), pages_assets()],
        lifespan=[lifespan],
        guards=[guard, check_query],
        exception_handlers={
            ProfilesError: on_error,
            HTTPException: on_http_exception,
            Exception: on_exception,
        },
        openapi_config=openapi_config(
            keys_required=bool(settings.api_keys),
            limited=bool(settings.rate_limit),
            root_path=settings.root_path,
        ),
        request_max_body_size=MAX_BODY_BYTES,
        logging_config=None,
    )
    # Around the router: it decodes paths before any of its own middleware runs.
    gateway = Edge(application.asgi_handler, shared_metrics)
    hit_path = FastPath(gateway, gateway.bodies)
    limit = (
        RateLimit(hit_path, gateway, settings.rate_limit, settings.rate_burst, shared_metrics)
        if settings.rate_limit
        else None
    )
    application.asgi_handler = behind_proxy(
        limit or hit_path,
        root_path=settings.root_path,
        trusted=settings.trusted_proxies,
        own={route.path.split("/")[1] for route in application.routes},
    )
    return application


def about_to_stop(application: Litestar) -> None:
    """Report not ready and ask no language model any more. Called when the server is told to stop."""
    application.state[operations.STOPPING] = True
    if (api := application.state.get("api")) is not None:
        api.writing.stop()


def _interrupt(service: Service) -> None:
    """End what reads the database for long: those requests are answered 503."""
    service.computation.stop_moments()
    service.database.interrupt()


def _assets() -> Router:
    static = Path(litestar_offline_docs.__file__).parent / "static"
    return create_static_files_router(path=ASSETS, directories=[static], include_in_schema=False, guards=[plain_name])


async def _erase_jobs(service: Service, user_id: str) -> QueueUnavailable | None:
    try:
        if service.queue is not None:
            await service.queue.erase(user_id)
    except QueueUnavailable as error:
        log.warning("jobs_not_erased", error=str(error))
        return QueueUnavailable(
            f"the user is erased, but for jobs that wait in the queue: {error.told}; erase again once it answers"
        )
    return None


def _api(service: Service, writing: Writing) -> Api:
    async def audit(actor: str, action: str, subject: str, outcome: str) -> None:
        await service.audit.begin(service.clock.now_ms(), actor, action, subject, outcome)

    async def erase(user_id: str) -> Holdings:
        # The queue first: what a worker takes out of it meanwhile is in the database before the user goes from there.
        unanswered = await _erase_jobs(service, user_id)
        erased = await service.users.erase(user_id, service.clock.now_ms())
        await service.invalidator.make_good()
        await service.users.erase_decisions(user_id)
        try:
            await service.cache.drop_user(user_id)
        except CacheUnavailable as error:  # no process reads these any more, and they expire
            log.warning("earlier_values_not_erased", error=str(error))
        if unanswered is not None:
            raise unanswered
        return erased

    async def start_rebuild(run_id: str) -> None:
        if service.queue is not None:
            await service.queue.start_rebuild(run_id)

    return Api(
        registry=service.contract.registry,
        availability=service.computation.availability,
        registries=service.registries,
        costs=service.costs,
        mirror=service.contract.mirror,
        retention_days=service.settings.retention_days,
        clock=service.clock,
        metrics=service.metrics,
        authenticator=Authenticator(service.settings.api_keys),
        sessions=Sessions(
            keys=service.settings.api_keys,
            records=SqliteSessions(service.database),
            clock=service.clock,
            new_id=lambda: secrets.token_urlsafe(16),
            lifetime_hours=service.settings.session_hours,
            instance=service.database.id[:8],
        ),
        session_hours=service.settings.session_hours,
        root_path=service.settings.root_path,
        reader=service.reader,
        rebuilder=service.rebuilder,
        ingestor=service.ingestor,
        letters=service.letters,
        users=service.users,
        user_events=service.user_events,
        inspector=service.inspector,
        samples=service.samples,
        process=service.process,
        book=service.book,
        runner=service.runner,
        quality=service.quality,
        erase=erase,
        recall=service.recall,
        start_rebuild=start_rebuild,
        audit=audit,
        trail=service.audit,
        scorer=service.bandit.scorer,
        lineup=service.bandit.lineup,
        rollout=service.bandit.rollout,
        pruning_waits=service.retention.waiting,
        unknown_decisions=lambda: unknown_decisions(service.database, service.clock.now_ms()),
        replayer=Replayer(service.ingestor, service.letters, service.clock),
        writing=writing,
        readiness=lambda: readiness(service),
        gauges=lambda: gauges(service),
        refresh_gauges=lambda: refresh_gauges(service),
        new_id=lambda: secrets.token_hex(8),
    )


def spare_the_collector() -> None:
    """Tell Python's cycle collector that what was made at start will stay, and not to look for more so often.

    A request's own objects die by their reference counts; looking for cycles every 700 allocations cost three to four
    percent of a warm read. Nothing is collected first: of a hundred thousand objects a few hundred are garbage then,
    and looking for them took 35 ms of the start. `profiles serve` keeps the collector off until here.
    """
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 10, 10)
    gc.enable()


async def serve(settings: Settings, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT; requests that were begun are finished, where they do not take too long.

    Raises:
        ProfilesError: whatever forbids to start.
    """
    settings.require_safe_binding()
    settings.require_servers()
    settings.require_whole_model()
    async with open_service(settings, door="http") as service, sampling(service, "api"):
        application = create_app(settings, service=service)
        spare_the_collector()
        if not settings.api_keys:
            log.warning("no_api_keys", detail="everyone on this machine may do everything", host=settings.host)
        log.info("serving", url=f"http://{settings.host}:{settings.port}", database=str(settings.database))
        on_ready()
        await listen(
            application,
            settings.host,
            settings.port,
            on_stop=lambda: about_to_stop(application),
            on_overdue=lambda: _interrupt(service),
            drain_s=settings.drain_s,
            keep_alive_s=settings.keep_alive_s,
        )


def run(settings: Settings) -> None:
    """Serve until told to stop; raises as `serve`."""
    configure_logging(settings.log_format, settings.log_level)
    uvloop.run(serve(settings))
