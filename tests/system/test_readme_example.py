"""The copy of the tree in which CI runs the suite once more has the README's feature, and serves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT
from tests.support.readme_example import CLIENT, DEFINITIONS, SCHEMA, Example, copy_with_example, readme_example


@pytest.fixture(scope="module")
def example() -> Example:
    example = readme_example()
    if example.constant in (ROOT / DEFINITIONS).read_text():
        pytest.skip("this tree is such a copy itself")
    return example


@pytest.fixture(scope="module")
def tree(example: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("example") / "tree"
    copy_with_example(tree, example)
    return tree


def test_copy_differs_in_two_files_and_the_exported_contract(tree: Path) -> None:
    copied = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    changed = {path for path in copied if (tree / path).read_bytes() != (ROOT / path).read_bytes()}
    assert changed == {DEFINITIONS, SCHEMA, CLIENT}
    assert {Path("Makefile"), Path(".ci/run"), Path(".dockerignore"), Path("requirements.lock")} <= copied


def test_copy_serves_the_feature(tree: Path, example: Example) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROFILES_")}

    def printed(*arguments: str) -> Any:
        return json.loads(
            subprocess.run(
                [sys.executable, "-m", "app", *arguments],
                cwd=tree,
                env={**environment, "PYTHONPATH": str(tree)},
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            ).stdout
        )

    name = example.constant.lower()
    assert printed("features", "--format", "json")["features"][-1]["name"] == name
    assert list(printed("features", "--format", "json-schema")["$defs"]["ProfileFeatures"]["properties"])[-1] == name
    assert printed("features", "test", name, "--json") == [{"feature": name, "examples": 1, "failures": []}]
