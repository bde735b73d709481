"""The wheel in an environment without extras, and so without NumPy: profiles are served, and no decisions are made."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.support.events import payload, served
from tests.support.http import Connection, serving
from tests.support.processes import ROOT, Program, environment_of, free_port
from tests.support.servers import VALKEY, StartServer
from tests.support.traffic import now_ms
from tests.support.wheels import built

pytestmark = pytest.mark.slow


def needed(requirements: Iterable[str], extras: Iterable[str], found: dict[str, Path]) -> None:
    """Add what the requirements need, directly or not, to `found`: the name of a file or package, and its place."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        installed = distribution(requirement.name)
        tops = {file.parts[0] for file in installed.files or () if file.parts[0] != ".."}
        if not tops <= found.keys():
            found.update((top, Path(str(installed.locate_file(top)))) for top in tops)
            needed(installed.requires or (), requirement.extras, found)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with our wheel. What the wheel requires is linked from our environment, so
    that no index is needed."""
    place = tmp_path_factory.mktemp("bare")
    wheel = built(ROOT, "app", place)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True, timeout=100)
    interpreter = place / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter)]
    subprocess.run([*pip, "install", "-qq", "--no-deps", "--no-index", str(wheel)], check=True, timeout=100)
    (packages,) = place.glob("venv/lib/python*/site-packages")
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    found: dict[str, Path] = {}
    needed(metadata.get_all("Requires-Dist", []), (), found)
    for top, path in found.items():
        (packages / top).symlink_to(path)
    assert not (packages / "numpy").exists()
    return interpreter


@contextmanager
def running(python: Path, directory: Path, *arguments: str, **settings: object) -> Iterator[Program]:
    environment = {**environment_of(features=None, database=directory / "p.db", **settings), "PYTHONPATH": ""}
    program = Program(("app", *arguments), environment, directory, python=python)
    try:
        yield program
    finally:
        program.close()


async def test_wheel_without_extras_serves_profiles_only(
    python: Path, tmp_path: Path, start_server: StartServer
) -> None:
    servers = {"cache_url": start_server(VALKEY).url, "queue_url": start_server(VALKEY).url}
    with running(python, tmp_path, "migrate") as migration:
        assert migration.wait() == 0, migration.output
    with running(python, tmp_path, "serve", scoring=1, **servers) as refused:
        assert refused.wait() == 2
        assert "PROFILES_SCORING: needs NumPy, which is not installed: run pip install 'profiles[scoring]'" in (
            refused.output
        )
    port, metrics_port = free_port(), free_port()
    with (
        running(python, tmp_path, "serve", port=port, **servers) as api,
        running(python, tmp_path, "worker", worker_metrics_port=metrics_port, **servers) as worker,
    ):
        await serving(port)
        worker.says("worker_started")
        connection = Connection(port)
        assert (await connection.post("/events", [payload(served("ann", now_ms()))])).status == 202
        profile = (await connection.get("/profiles/ann")).json
        assert profile["features"]["tip_volume_30d"] == 1
        assert (await connection.post("/score", {"user_id": "ann", "candidates": []})).status == 404
        assert "/score" not in (await connection.get("/schema/openapi.json")).json["paths"]
        await connection.close()
        assert (worker.stop(), api.stop()) == (0, 0)
    with running(python, tmp_path, "doctor", "--full", "--json", **servers) as doctor:
        doctor.wait()
    assert '"dead letters"' in doctor.output, doctor.output
    assert '"evidence"' not in doctor.output
