"""A copy of the program that a test may change, and what one of our modules finds with it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, environment_of


def copied_program(directory: Path) -> Path:
    """A new directory in `directory` with a copy of `app`, beside the tests themselves."""
    tree = directory / "copy"
    shutil.copytree(ROOT / "app", tree / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests").symlink_to(ROOT / "tests")
    return tree


def found_by(module: str, tree: Path, *arguments: object) -> Any:
    """The JSON that a module of the tests prints when it runs with the program in `tree`."""
    shown = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=tree,
        env={**environment_of(features=None), "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)
