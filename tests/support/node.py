"""Node, and the npm packages in the versions that `tests/node/package-lock.json` pins by hash."""

import fcntl
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from tests.support.processes import ROOT
from tests.support.programs import missing

PINNED = ROOT / "tests" / "node"
INSTALLED = ROOT / ".node"
OLDEST = 18
INSTALL_S, RUN_S = 300, 100


@cache
def node_modules() -> Path:
    """The directory of the packages, which the first test installs. If Node or npm is missing or the packages cannot be
    had, the test is skipped, or fails in CI."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        missing("Node or npm is missing: apt-get install nodejs npm")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(re.findall(r"\d+", version)[0]) < OLDEST:
        missing(f"Node {OLDEST} or later is needed, not {version}")
    INSTALLED.mkdir(exist_ok=True)
    installed = INSTALLED / "installed.json"
    pinned = (PINNED / "package-lock.json").read_bytes()
    with (INSTALLED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes install into the same directory
        if not installed.exists() or installed.read_bytes() != pinned:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(PINNED / name, INSTALLED)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
            done = subprocess.run(
                command, cwd=INSTALLED, capture_output=True, text=True, check=False, timeout=INSTALL_S
            )
            if done.returncode:
                missing(f"the packages of {PINNED.relative_to(ROOT)} cannot be installed: {done.stderr[-500:]}")
            installed.write_bytes(pinned)
    return INSTALLED / "node_modules"


def node(script: str | Path, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Run a script of `cwd`, or a program of the packages such as `typescript/bin/tsc`; its output. It must succeed."""
    path = cwd / script
    if not path.exists():
        path = node_modules() / script
    done = subprocess.run(
        ["node", path, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return done.stdout


def with_packages(directory: Path) -> Path:
    """Make the packages importable for scripts in a directory."""
    (directory / "node_modules").symlink_to(node_modules())
    return directory
