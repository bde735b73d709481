"""The Python client as a package: its contract is current, and it needs nothing of the service."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import profiles_client
from app.features.definitions import REGISTRY
from app.features.export import python
from app.features.schema import ProfileFeatures
from tests.support.processes import ROOT

PACKAGE = ROOT / "app" / "clients" / "python"
SOURCES = sorted((PACKAGE / "profiles_client").glob("*.py"))


def test_contract_is_what_the_registry_exports() -> None:
    current = (PACKAGE / "profiles_client" / "features.py").read_text()
    assert current == python(REGISTRY, ProfileFeatures), (
        "run `profiles features --format python > app/clients/python/profiles_client/features.py`"
    )


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_package_imports_only_what_it_requires() -> None:
    required = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {re.split(r"[^A-Za-z0-9\-]", name)[0].replace("-", "_") for name in required}
    found = set.union(*map(imported, SOURCES)) - sys.stdlib_module_names
    assert found == allowed | {"profiles_client"}


def test_everything_exported_has_a_docstring() -> None:
    assert sorted(profiles_client.__all__) == profiles_client.__all__
    assert not [name for name in profiles_client.__all__ if not getattr(profiles_client, name).__doc__]
