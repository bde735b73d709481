"""Prometheus with the configuration of docker/observability tells when a server fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.fleet import Fleet
from tests.support.http import Broken, Connection
from tests.support.postgres import missing
from tests.support.processes import ROOT, free_port
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.slow
FILES = ROOT / "docker" / "observability"


@contextmanager
def running_prometheus(directory: Path, targets: dict[str, str]) -> Iterator[int]:
    """The port of a Prometheus that scrapes `targets` every second, and whose alerts fire after two."""
    program = shutil.which("prometheus") or missing("prometheus is missing: apt-get install prometheus")
    config = (FILES / "prometheus.yml").read_text().replace("15s", "1s")
    for documented, address in targets.items():
        assert f'"{documented}"' in config
        config = config.replace(documented, address)
    (directory / "prometheus.yml").write_text(config)
    (directory / "rules.yml").write_text(re.sub(r"for: \d+m", "for: 2s", (FILES / "rules.yml").read_text()))
    port = free_port()
    options = [
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "prometheus.log").open("wb") as log:
        child = subprocess.Popen([program, *options], stdout=log, stderr=subprocess.STDOUT)
    try:
        yield port
    finally:
        child.terminate()
        child.wait(30)


class Prometheus:
    def __init__(self, port: int) -> None:
        self._server = Connection(port)

    async def series(self, query: str) -> list[dict[str, str]]:
        """The labels of the series that a query finds; none while Prometheus starts."""
        try:
            answer = await self._server.get("/api/v1/query?query=" + quote(query, safe=""))
        except Broken:
            return []
        return [found["metric"] for found in answer.json["data"]["result"]] if answer.status == 200 else []

    async def alerts(self) -> set[str]:
        return {labels["alertname"] for labels in await self.series('ALERTS{alertstate="firing"}')}

    async def close(self) -> None:
        await self._server.close()


async def test_alert_fires_when_the_cache_is_killed(fleet: Fleet, tmp_path: Path) -> None:
    (api,) = await fleet.apis(1)
    worker = fleet.worker()
    targets = {"api:8000": f"127.0.0.1:{api.port}", "worker:8001": f"127.0.0.1:{worker.port}"}
    caller = Connection(api.port)
    with running_prometheus(tmp_path, targets) as port:
        prometheus = Prometheus(port)
        await eventually_async(lambda: prometheus.series("sum(up) == 2 and on () min(profiles_cache_available) == 1"))
        await eventually_async(lambda: prometheus.series("absent(ALERTS)"))
        fleet.cache.kill()

        async def told() -> bool:
            await caller.get("/profiles/ann")  # the circuit opens when reads fail
            return "ProfilesCacheUnavailable" in await prometheus.alerts()

        await eventually_async(told)
        await prometheus.close()
    await caller.close()
