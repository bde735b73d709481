"""The wheel of the Python client, in an environment that has nothing but what the wheel requires."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.processes import ROOT
from tests.support.wheels import assert_described, built, metadata

pytestmark = pytest.mark.slow
PACKAGE = ROOT / "app" / "clients" / "python"
SCRIPT = """
import asyncio, sys
from datetime import datetime, timedelta, timezone
from profiles_client import AsyncProfiles, Candidate, Invalid, Profiles, TipServed

url, user = sys.argv[1:]
now = datetime.now(timezone(timedelta(hours=2)))
candidates = [Candidate("t-1", is_overdue=True, task_age_days=3.5, priority=2), Candidate("t-2", False, 12, 1)]

with Profiles(url, deadline_s=30) as profiles:
    print(profiles.send([TipServed(user_id=user, tip_id="t-1", occurred_at=now)]).accepted)
    decision = profiles.decide(user, candidates, at=now)
    decision.served()
    decision.completed(dwell_ms=7_200, at=now)
    hour: int = profiles.profile(user).preferred_hour or 0
    print(profiles.profiles([user, "cold"])[user].tip_volume_30d, hour == now.hour)
    print([row.features.tip_volume_30d for row in profiles.history([(user, now - timedelta(days=1)), decision.id])])
    try:
        profiles.profile("a/b")
    except Invalid as error:
        print(error.issues[0].path)

async def main() -> None:
    async with AsyncProfiles(url, deadline_s=30) as profiles:
        print((await profiles.profile(user)).completion_rate_30d)
        chosen = await profiles.decide(user, candidates, default=None)
        print(chosen is not None and chosen.chosen_id in {"t-1", "t-2"})

asyncio.run(main())
"""
MISTAKE = """
from profiles_client import Profiles
with Profiles("http://h") as profiles:
    hour: str = profiles.profile("ann").preferred_hour or ""
    profiles.profile("ann").no_such_feature
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(PACKAGE, "profiles_client", tmp_path_factory.mktemp("wheel"))


def requirements(wheel: Path) -> Iterator[str]:
    for requirement in metadata(wheel).get_all("Requires-Dist", []):
        yield re.split(r"[^\w\-]", requirement)[0]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment. The requirements are copied from ours, so that no index is needed."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=100)
    interpreter = place / "bin" / "python"
    install = ("-m", "pip", "--python", interpreter, "install", "-qq", "--no-deps", "--no-index", wheel)
    assert run(sys.executable, *install, directory=place).returncode == 0
    (packages,) = place.glob("lib/python*/site-packages")
    for name in requirements(wheel):
        for file in distribution(name).files or ():
            if ".." not in file.parts:
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
    return interpreter


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    tree = PACKAGE / "profiles_client"
    assert names == {f"profiles_client/{path.name}" for path in tree.iterdir() if path.is_file()}
    assert "profiles_client/py.typed" in names
    assert_described(wheel)


def run(python: Path | str, *arguments: str | Path, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=100, check=False)


def test_clean_environment_cannot_import_the_service(python: Path, tmp_path: Path) -> None:
    for module in ("app", "litestar", "httpx"):
        assert "ModuleNotFoundError" in run(python, "-I", "-c", f"import {module}", directory=tmp_path).stderr


def test_script_of_a_stranger_runs(python: Path, service_url: str, tmp_path: Path) -> None:
    script = tmp_path / "stranger.py"
    script.write_text(SCRIPT)
    strict = ("-I", "-W", "error", "-W", "ignore:the service has other features")
    done = run(python, *strict, script, service_url, "stranger", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1", "2 True", "[0, 1]", "user_id", "1.0", "True"]


@pytest.mark.parametrize(("text", "errors"), [(SCRIPT, 0), (MISTAKE, 2)])
def test_types_reach_a_stranger(python: Path, tmp_path: Path, text: str, errors: int) -> None:
    script = tmp_path / "stranger.py"
    script.write_text(text)
    options = ("--strict", "--python-executable", python, "--config-file=")
    done = run(sys.executable, "-m", "mypy", *options, script, directory=tmp_path)
    assert len(re.findall(": error: ", done.stdout)) == errors, done.stdout + done.stderr
