"""Servers for the tests over HTTP. `site` and `keyed` serve the whole run, so each test uses users of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import pytest_asyncio

from app.api.routes import routes
from app.api.server import KEEP_ALIVE_S
from app.features.clock import Clock
from app.features.contract import Contract
from app.settings import Settings
from app.settings.parsers import PostgresUrl
from app.stores.queue.client import HEALTH_KEY
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.live import API_KEYS, Live, fresh_database, live
from tests.support.postgres import PostgresServer, new_database
from tests.support.registry import FEATURES
from tests.support.servers import VALKEY, StartServer, ask

ServeSite = Callable[..., AbstractAsyncContextManager[Live]]


@pytest.fixture(scope="session")
def cache_server(start_server: StartServer) -> EmbeddedServer:
    """The cache of all sites that do not bring their own. Each database has an id, so sites share no keys."""
    return start_server(VALKEY)


@pytest.fixture(scope="session")
def queue_server(start_server: StartServer) -> EmbeddedServer:
    """The queue of all sites that do not bring their own. No worker consumes it."""
    return start_server(VALKEY)


@pytest.fixture(scope="session")
def serve_site(
    migrated_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
    cache_server: EmbeddedServer,
    queue_server: EmbeddedServer,
) -> ServeSite:
    """Serves a site over an empty database, with settings by keyword."""
    for handler in routes(scoring=True):
        handler.signature_model  # noqa: B018  # each application copies its handlers, and would find it anew

    def serve(
        *,
        contract: Contract | None = None,
        clock: Clock | None = None,
        head_s: float = KEEP_ALIVE_S,
        **settings: object,
    ) -> AbstractAsyncContextManager[Live]:
        database = settings.get("database") or fresh_database(migrated_template, tmp_path_factory.mktemp("site"))
        servers = {"cache_url": cache_server.url, "queue_url": queue_server.url, "cache_timeout_ms": 5_000}
        chosen = {"features": FEATURES, **servers, **settings, "database": database}
        chosen_settings = Settings(**chosen)  # type: ignore[arg-type]  # by name
        return live(chosen_settings, contract=contract, clock=clock, head_s=head_s)

    return serve


def _settings(request: pytest.FixtureRequest) -> dict[str, object]:
    """A database on the engine that the test runs on: see `tests.support.database`."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return {}
    server: PostgresServer = request.getfixturevalue("postgres")
    return {"database": new_database(server)}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(request: pytest.FixtureRequest, serve_site: ServeSite) -> AsyncIterator[Live]:
    """A site without keys: every caller has all scopes."""
    async with serve_site(**_settings(request)) as served:
        yield served


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def keyed(request: pytest.FixtureRequest, serve_site: ServeSite) -> AsyncIterator[Live]:
    """A site with the keys of `tests.support.live.API_KEYS`."""
    async with serve_site(api_keys=API_KEYS, **_settings(request)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="session")
async def own_site(store: Path | PostgresUrl, serve_site: ServeSite) -> AsyncIterator[Live]:
    """A site for one test, without keys, over an empty database and the shared servers."""
    async with serve_site(database=store) as served:
        yield served


@pytest.fixture
def cache(start_server: StartServer) -> EmbeddedServer:
    """A cache that the test may stop."""
    return start_server(VALKEY)


@pytest_asyncio.fixture(loop_scope="session")
async def site_without_cache(cache: EmbeddedServer, serve_site: ServeSite) -> AsyncIterator[Live]:
    """A site without keys whose cache has died."""
    async with serve_site(cache_url=cache.url) as served:
        cache.kill()
        yield served


@pytest.fixture
def queue(start_server: StartServer) -> EmbeddedServer:
    """A queue that the test may stop, with the heartbeat of a worker."""
    server = start_server(VALKEY)
    ask(server, "SET", HEALTH_KEY, "alive")
    return server
