"""Conventions of the repository: module sizes, lock files and the wheel."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.processes import ROOT
from tests.support.wheels import assert_described, built

MAX_LINES = 400


@pytest.mark.parametrize("lock", ["requirements.lock", "docker/requirements.lock"])
def test_lock_pins_versions_and_hashes_and_names_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*(-|--)[if]", text, re.MULTILINE)
    assert not re.search(r"^\s*--(?!hash=sha256:)", text, re.MULTILINE)
    pins = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert all(re.match(r"[A-Za-z0-9_.\-]+(\[[a-z,\-]+\])?==\S+", pin) for pin in pins)


def test_image_is_built_from_the_versions_that_are_tested() -> None:
    def pins(path: str) -> dict[str, str]:
        text = (ROOT / path).read_text()
        return dict(re.findall(r"^([A-Za-z0-9_.\-]+)(?:\[[a-z,\-]+\])?==(\S+)", text, re.MULTILINE))

    tested = pins("requirements.lock")
    for name, version in pins("docker/requirements.lock").items():
        assert tested[name] == version


def test_modules_have_a_docstring_and_at_most_400_lines() -> None:
    texts = {path: path.read_text() for path in (ROOT / "app").rglob("*.py") if path.stat().st_size}
    assert not [path for path, text in texts.items() if len(text.splitlines()) > MAX_LINES]
    assert not [path for path, text in texts.items() if not ast.get_docstring(ast.parse(text))]


def test_package_is_typed_for_its_consumers() -> None:
    assert (ROOT / "app" / "py.typed").exists()


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    wheel = built(ROOT, "app", tmp_path)
    tree = {str(path.relative_to(tmp_path)) for path in (tmp_path / "app").rglob("*") if path.is_file()}
    clients = {path for path in tree if path.startswith("app/clients/")}  # packages of their own
    held = set(ZipFile(wheel).namelist())
    assert_described(wheel)
    assert tree - clients <= held
    assert not held & clients
