"""A new entry, as printed: it loads, its example holds, and the formatter has nothing to change."""

import itertools
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from app.bootstrap.engines import load_contract
from app.errors import RegistryError
from app.features.contract import Contract
from app.features.export import python, scaffold
from app.settings import Settings
from app.stores.sqlite.feature_examples import run_examples

COMBINATIONS = list(itertools.product(("feedback", "views"), ("float", "int", "str")))
MONTH, HOUR = timedelta(days=30), timedelta(hours=1)


def loaded(path: Path, text: str) -> Contract:
    """The registry in a file with this text."""
    path.write_text(text)
    return load_contract(Settings(), f"{path}:REGISTRY")


async def run(contract: Contract) -> tuple[int, list[str]]:
    """How many examples there are, and what fails."""
    (found,) = await run_examples(contract.registry, 1, 10.0)
    return found.examples, found.failures


@pytest.mark.slow
@pytest.mark.parametrize(("relation", "dtype"), COMBINATIONS)
async def test_printed_module_loads_and_its_example_holds(tmp_path: Path, relation: str, dtype: str) -> None:
    contract = loaded(tmp_path / "features.py", scaffold("probe", relation, dtype, MONTH, HOUR))
    (entry,) = contract.registry
    assert (entry.name, entry.dtype, entry.window, entry.ttl) == ("probe", dtype, MONTH, HOUR)
    assert entry.relations == (relation,)
    assert "30 days" in entry.description
    assert await run(contract) == (1, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "window", [timedelta(minutes=1), pytest.param(timedelta(minutes=45), marks=pytest.mark.slow), timedelta(days=9_999)]
)
async def test_example_holds_when_the_window_is_short_or_long(tmp_path: Path, window: timedelta) -> None:
    for number, (relation, dtype) in enumerate(COMBINATIONS):
        path = tmp_path / f"features{number}.py"
        path.write_text(scaffold("probe", relation, dtype, window, HOUR))
        contract = load_contract(Settings(retention_days=20_000), f"{path}:REGISTRY")
        assert await run(contract) == (1, [])


@pytest.mark.parametrize("width", [88, 120])
def test_formatter_leaves_printed_modules_as_they_are(tmp_path: Path, width: int) -> None:
    for number, (relation, dtype) in enumerate(COMBINATIONS):
        text = scaffold("a_feature_with_a_long_name_30d", relation, dtype, timedelta(hours=36), HOUR)
        (tmp_path / f"features{number}.py").write_text(text)
    command = [sys.executable, "-m", "ruff", "format", "--isolated", f"--line-length={width}", "--diff", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (shown.returncode, shown.stdout) == (0, "")


@pytest.mark.parametrize(("relation", "dtype"), COMBINATIONS)
def test_mirror_line_agrees_when_it_is_pasted(tmp_path: Path, relation: str, dtype: str) -> None:
    printed = scaffold("probe", relation, dtype, MONTH, HOUR)
    module, _, comment = printed.partition("# Its line in the mirror")
    pasted = "\n".join(line.removeprefix("#") for line in comment.splitlines()[1:]) + "\n"
    mirror = python(loaded(tmp_path / "features.py", printed).registry, msgspec.defstruct("ProfileFeatures", []))
    head = mirror[: mirror.index("    probe:")]
    assert mirror.startswith(f"{head}{pasted}    FINGERPRINTS: ")
    contract = loaded(tmp_path / "mirrored.py", f"{head}{pasted}\n\n{module}")
    assert contract.mirror.__struct_fields__ == ("probe",)
    assert contract.mirror.__module__ != "app.features.schema"


def test_entry_has_another_constant_when_it_would_hide_the_registry(tmp_path: Path) -> None:
    contract = loaded(tmp_path / "features.py", scaffold("registry", "views", "int", MONTH, HOUR))
    assert contract.registry.names == ("registry",)


@pytest.mark.parametrize("name", ["1x", "a-b", "class", "", "é", "a b"])
def test_name_is_refused_when_it_is_no_identifier(name: str) -> None:
    with pytest.raises(RegistryError, match="ASCII identifier"):
        scaffold(name, "views", "int", MONTH, HOUR)
