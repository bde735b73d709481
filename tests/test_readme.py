"""The README is true: it names every setting, metric and feature, and every command in it runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from app.settings import described
from app.telemetry import Metrics
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually_sync

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BY_CI = re.compile(r"^(make|docker) ")
HERE = [block for block in BLOCKS if not BY_CI.match(block)]


def test_readme_names_every_setting_with_its_default() -> None:
    for name, default, _ in described():
        row = re.search(rf"^\| `{name}` \|(.*?)\|", README, re.MULTILINE)
        assert row is not None, f"{name} is not in the table of settings"
        assert row[1].strip().strip("`") == default


def test_readme_names_no_setting_that_is_none() -> None:
    known = {name for name, _, _ in described()}
    assert set(re.findall(r"PROFILES_[A-Z_]+[A-Z]", README)) <= known


def test_readme_names_every_metric() -> None:
    metrics = Metrics()
    for late in metrics.bandit.late:
        late.set(0)
    for family in metrics.collectors.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}`" in README, f"{name} is not explained"


def test_readme_shows_every_feature_as_it_is_registered() -> None:
    for entry in REGISTRY:
        default = "null" if entry.default is None else entry.default
        assert re.search(rf"^\| `{entry.name}` \| {entry.dtype} \|.*\| {default} \|", README, re.MULTILINE)


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z]+)`", README)) | set(re.findall(r"^make ([a-z]+)$", README, re.MULTILINE))
    assert {"up", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), f"make {target} does not exist"


def test_the_two_commands_are_what_ci_runs() -> None:
    assert BLOCKS[:2] == ["make up\n", "make test\n"]
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """`profiles up`, as `make up` runs it, in a directory of its own; and a shell's environment beside it."""
    directory = tmp_path_factory.mktemp("up")
    shim = directory / "bin" / "profiles"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m app "$@"\n')
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PROFILES_DATABASE": str(directory / "var" / "profiles.db"),
        "PROFILES_PORT": str(port),
        "PROFILES_WORKER_METRICS_PORT": "0",
        "PWD": str(directory),
    }
    with (directory / "log").open("wb") as log:
        child = subprocess.Popen([shim, "up"], env=environment, cwd=directory, stdout=log, stderr=log)
    try:
        eventually_sync(lambda: answers(f"http://127.0.0.1:{port}/readyz"), timeout_s=60)
        yield environment
    finally:
        child.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(30)
        child.kill()
        child.wait()


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
        return bool(answer.status == 200)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("block", HERE, ids=[f"block-{number}" for number in range(len(HERE))])
def test_commands_of_the_readme_run(block: str, environment: dict[str, str]) -> None:
    assert shutil.which("curl"), "the README's commands need curl"
    script = block.replace("127.0.0.1:8000", f"127.0.0.1:{environment['PROFILES_PORT']}")
    script = re.sub(r"\bcurl -s\b", "curl -sS --fail-with-body -w '\\\\n'", script)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment,
        cwd=environment["PWD"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, textwrap.shorten(done.stdout + done.stderr, 2000)
