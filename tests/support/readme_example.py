"""Copies this tree and adds the README's example of a feature: `python -m tests.support.readme_example DIRECTORY`.

CI runs all tests in such a copy, to prove that adding a feature takes two edits. The README's command
`profiles features new` prints both: an entry for `definitions.py`, and a line of the mirror for `schema.py`. The
contract of the Python client is exported anew.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

from tests.support.processes import ROOT

DEFINITIONS = Path("app/features/definitions.py")
SCHEMA = Path("app/features/schema.py")
CLIENT = Path("app/clients/python/profiles_client/features.py")
COMMAND = re.compile(r"^profiles (features new .*)$", re.MULTILINE)
REGISTRY = re.compile(r"^REGISTRY = Registry\(\[(.*?),?\s*\]\)$", re.MULTILINE | re.DOTALL)
# Files of a working tree that are not part of the repository.
UNTRACKED = (".git", ".venv*", ".env", ".*_cache", ".hypothesis", ".schemathesis", ".coverage*")
MADE = ("__pycache__", "*.egg-info", "var", "build", "dist", "htmlcov")


class Example(NamedTuple):
    constant: str
    entry: str
    mirror_line: str


def readme_example() -> Example:
    """Run the README's command.

    Raises:
        ValueError: the README has no such command, or more than one.
    """
    (command,) = COMMAND.findall((ROOT / "app/features/README.md").read_text())
    arguments = [sys.executable, "-m", "app", *shlex.split(command)]
    printed = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    module, _, mirror = printed.partition("# Its line in the mirror")
    entry = re.search(r"^(\w+) = Feature\(.*^\)$", module, re.MULTILINE | re.DOTALL)
    assert entry is not None, printed
    mirror_line = re.sub("^#", "", mirror.partition("\n")[2], flags=re.MULTILINE)  # the line is a comment in the output
    return Example(entry[1], entry[0], mirror_line)


def apply(example: Example, tree: Path) -> None:
    definitions, schema = tree / DEFINITIONS, tree / SCHEMA
    text = definitions.read_text()
    found = REGISTRY.search(text)
    assert found is not None, f"{DEFINITIONS} has no list of entries"
    registry = f"REGISTRY = Registry([{found[1]}, {example.constant}])"
    definitions.write_text(f"{text[: found.start()]}{example.entry}\n\n{registry}{text[found.end() :]}")
    lines = schema.read_text().splitlines(keepends=True)
    mirror = next(node for node in ast.parse("".join(lines)).body if getattr(node, "name", "") == "ProfileFeatures")
    assert mirror.end_lineno is not None
    lines.insert(mirror.end_lineno, example.mirror_line)
    schema.write_text("".join(lines))


def copy_with_example(tree: Path, example: Example) -> None:
    """Copy this tree to a new directory, apply the example there, and export the contract."""
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*UNTRACKED, *MADE))
    apply(example, tree)
    command = [sys.executable, "-m", "app", "features", "--format", "python"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PROFILES_")}
    environment = {**inherited, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    (tree / CLIENT).write_bytes(subprocess.run(command, cwd=tree, env=environment, check=True, stdout=PIPE).stdout)


if __name__ == "__main__":
    copy_with_example(Path(sys.argv[1]), readme_example())
