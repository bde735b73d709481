"""Wheels of the project and of its client."""

import shutil
import subprocess
import sys
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

from tests.support.waiting import PATIENCE_S


def built(project: Path, package: str, directory: Path) -> Path:
    """The wheel of a project with one package, built from a copy in `directory`: setuptools writes into it."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(project / name, directory)
    shutil.copytree(project / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(command, cwd=directory, check=True, timeout=2 * PATIENCE_S)
    (wheel,) = (directory / "wheels").glob("*.whl")
    return wheel


def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_bytes(archive.read(name))


def assert_described(wheel: Path) -> None:
    """The metadata has what the page of a package index shows."""
    found = metadata(wheel)
    for field in ("Summary", "Keywords", "Classifier", "Project-URL", "Description-Content-Type"):
        assert found[field], field
    assert str(found.get_payload()).startswith("# ")
