"""The composition root: the application by itself, and what forbids to serve."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from litestar import Litestar

from app.asgi import COLLECT_AFTER, create_app, serve
from app.bootstrap.service import open_service
from app.errors import ProfilesError, SchemaMismatch, SettingsError, StoreUnavailable
from app.settings import Settings
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import payload, served
from tests.support.live import NO_TLS, new_user
from tests.support.processes import ROOT, environment_of
from tests.support.registry import FEATURES


def _servers(valkey: EmbeddedServer) -> dict[str, Any]:
    return {"cache_url": valkey.url, "cache_timeout_ms": 5_000, "queue_url": valkey.url}


def _client(application: Litestar) -> httpx.AsyncClient:
    # The same protocol, typed otherwise.
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(cast(Any, application)), base_url="http://localhost", verify=NO_TLS
    )


@pytest.mark.slow
async def test_application_opens_and_closes_its_own_service_when_it_is_given_none(
    database_path: Path, valkey: EmbeddedServer
) -> None:
    application = create_app(Settings(features=FEATURES, database=database_path, **_servers(valkey)))
    user = new_user()
    for expected in (1, 2):
        async with (
            application.lifespan(),
            _client(application) as client,
        ):
            now = application.state.service.clock.now_ms()
            sent = await client.post("/events", json=payload(served(user, now)))
            assert sent.status_code == 202
            answer = await client.get(f"/profiles/{user}")
            assert answer.json()["features"]["tip_volume_30d"] == expected
            assert answer.headers["x-request-id"]
            assert b"profiles_http_request_duration_seconds" in (await client.get("/metrics")).content


async def test_application_computes_every_read_when_no_server_is_named(database_path: Path) -> None:
    application = create_app(Settings(features=FEATURES, database=database_path))
    async with (
        application.lifespan(),
        _client(application) as client,
    ):
        answer = await client.get("/profiles/u?detail=true")
        assert {cell["origin"] for cell in answer.json()["features"].values()} == {"computed"}
        assert (await client.get("/readyz")).json()["status"] == "degraded"


async def test_application_does_not_start_when_the_database_is_missing(tmp_path: Path) -> None:
    application = create_app(Settings(features=FEATURES, database=tmp_path / "missing.db"))
    with pytest.raises(ExceptionGroup) as caught:  # Litestar's own task group wraps it
        async with application.lifespan():
            pass
    assert caught.group_contains(
        StoreUnavailable, match=r"there is no database at .*missing\.db; run `profiles migrate`"
    )


LOADED = """
import asyncio, sys
import httpx
from app.asgi import create_app
from app.worker import work
async def main():
    application = create_app()
    async with application.lifespan(), httpx.AsyncClient(
        transport=httpx.ASGITransport(application), base_url="http://localhost"
    ) as client:
        assert (await client.get("/profiles/ann")).status_code == 200
asyncio.run(main())
# Litestar loads the names of attributes, if they are installed.
print([name for name in sys.modules if name.startswith("opentelemetry.") and "semconv" not in name])
"""


@pytest.mark.slow
def test_nothing_of_opentelemetry_is_loaded_when_traces_are_off(database_path: Path) -> None:
    program = [sys.executable, "-c", LOADED]
    environment = environment_of(database=database_path)
    assert subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout == "[]\n"


async def test_start_is_refused_when_opentelemetry_is_missing(
    database_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "app.telemetry.tracing", None)  # as if its imports failed
    settings = Settings(features=FEATURES, database=database_path, traces_url="http://127.0.0.1:4318")
    with pytest.raises(SettingsError, match=r"PROFILES_TRACES_URL.*pip install 'profiles\[otel\]'"):
        async with open_service(settings, door="http"):
            pass


async def _refused(settings: Settings, error: type[ProfilesError], text: str) -> None:
    told: list[bool] = []
    with pytest.raises(error, match=text):
        await serve(replace(settings, port=0), lambda: told.append(True))
    assert not told


async def test_service_does_not_start_when_others_could_reach_it_without_keys(
    database_path: Path, valkey: EmbeddedServer
) -> None:
    settings = Settings(features=FEATURES, database=database_path, host="0.0.0.0", **_servers(valkey))  # noqa: S104  # refused
    await _refused(settings, SettingsError, "PROFILES_API_KEYS: must hold at least one key")


async def test_service_does_not_start_when_no_server_is_named(database_path: Path) -> None:
    await _refused(
        Settings(features=FEATURES, database=database_path), SettingsError, "PROFILES_CACHE_URL: must be set"
    )


async def test_service_does_not_start_when_history_is_kept_too_short(
    database_path: Path, valkey: EmbeddedServer
) -> None:
    settings = Settings(features=FEATURES, database=database_path, retention_days=59, **_servers(valkey))
    await _refused(settings, SettingsError, "PROFILES_RETENTION_DAYS: must be at least 60")


@pytest.mark.parametrize("name", ["cache_url", "queue_url"])
async def test_service_does_not_start_when_a_url_has_an_option_that_means_nothing(
    database_path: Path, valkey: EmbeddedServer, name: str
) -> None:
    urls = {**_servers(valkey), name: "redis://127.0.0.1:1/0?socket_timeout=soon"}
    await _refused(
        Settings(features=FEATURES, database=database_path, **urls), SettingsError, f"PROFILES_{name.upper()}: "
    )


async def test_service_does_not_start_when_the_database_is_not_migrated(tmp_path: Path, valkey: EmbeddedServer) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    settings = Settings(features=FEATURES, database=path, **_servers(valkey))
    await _refused(settings, SchemaMismatch, "is not migrated; run `profiles migrate`")


async def test_cycle_collector_is_on_when_the_service_is_ready(database_path: Path, valkey: EmbeddedServer) -> None:
    thresholds = gc.get_threshold()
    seen: list[tuple[bool, int]] = []

    def stop() -> None:
        seen.append((gc.isenabled(), gc.get_threshold()[0]))
        os.kill(os.getpid(), signal.SIGTERM)

    gc.disable()  # as `profiles serve` does
    try:
        await serve(Settings(features=FEATURES, database=database_path, port=0, **_servers(valkey)), on_ready=stop)
        assert seen == [(True, COLLECT_AFTER)]
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def test_service_stops_when_the_port_is_taken(database_path: Path, valkey: EmbeddedServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(features=FEATURES, database=database_path, port=taken.getsockname()[1], **_servers(valkey))
        with pytest.raises(SettingsError, match=r"PROFILES_PORT: cannot serve on 127\.0\.0\.1:\d+"):
            await serve(settings)


@pytest.mark.slow
def test_litestar_finds_the_application_without_arguments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "litestar", "--app", "app.asgi:create_app", "routes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROFILES_FEATURES": FEATURES}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "/profiles/{user_id:str}" in shown.stdout
