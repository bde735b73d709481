"""`PROFILES_FEATURES`: a registry of one's own is loaded from a module or a file, and every fault is one clear line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.bootstrap.engines import load_contract
from app.errors import ProfilesError, RegistryError, SettingsError
from app.features.definitions import REGISTRY
from app.features.schema import ProfileFeatures
from app.settings import Settings
from tests.support.processes import ROOT
from tests.support.registry import own_entry, own_registry

SOUND = own_entry()
MIRROR = """
import msgspec
from typing import Annotated
class ProfileFeatures(msgspec.Struct):
    {name}: Annotated[int | None, msgspec.Meta(description="A feature of the tests.")] = None
"""


def problem(source: str) -> str:
    """Why a registry cannot be loaded, in one line."""
    with pytest.raises(ProfilesError) as caught:
        load_contract(Settings(features=source))
    assert isinstance(caught.value, SettingsError | RegistryError)
    text = str(caught.value)
    assert "\n" not in text
    return text


def appended(source: str, text: str) -> str:
    path = Path(source.partition(":")[0])
    path.write_text(path.read_text() + text)
    return source


@pytest.fixture
def own(tmp_path: Path) -> str:
    return own_registry(tmp_path / "own.py", SOUND)


# --- what is loaded


def test_registry_of_the_service_is_served_when_none_is_named() -> None:
    contract = load_contract(Settings())
    assert contract.registry.names == REGISTRY.names
    assert contract.mirror is ProfileFeatures


def test_registry_in_a_file_is_compiled_and_mirrored(own: str) -> None:
    contract = load_contract(Settings(features=own))
    assert contract.registry.names == contract.mirror.__struct_fields__ == ("probe",)
    assert contract.registry[0].relations == ("views",)


def test_another_registry_is_loaded_when_the_command_names_it(own: str, tmp_path: Path) -> None:
    other = own_registry(tmp_path / "other.py", own_entry(name="other"))
    assert load_contract(Settings(features=own), other).registry.names == ("other",)
    with pytest.raises(SettingsError, match=r"^--registry: cannot load .*missing\.py: No such file"):
        load_contract(Settings(features=own), str(tmp_path / "missing.py:REGISTRY"))


def test_file_is_found_by_relative_path_and_tilde(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("own.py:REGISTRY", "./own.py:REGISTRY", "~/own.py:REGISTRY"):
        assert load_contract(Settings(features=source)).registry.names == ("probe",)


def test_file_may_have_any_name_and_refer_to_its_own_types(tmp_path: Path) -> None:
    source = own_registry(tmp_path / "my features-2.py", SOUND)
    appended(source, "from dataclasses import dataclass\n@dataclass\nclass Note:\n    text: 'str | None' = None\n")
    assert load_contract(Settings(features=source)).registry.names == ("probe",)


def test_mirror_beside_the_registry_is_the_one_served(own: str) -> None:
    contract = load_contract(Settings(features=appended(own, MIRROR.format(name="probe"))))
    assert contract.mirror.__module__.startswith("profiles_features_")


def test_mirror_is_not_looked_at_when_it_is_to_be_written_anew(own: str) -> None:
    appended(own, MIRROR.format(name="another"))
    assert "'another': it is in the mirror ProfileFeatures, but not in the registry" in problem(own)
    contract = load_contract(Settings(features=own), own_mirror=False)
    assert contract.mirror.__struct_fields__ == ("probe",)


def test_module_is_imported_by_its_name_from_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shop_of_the_tests"
    package.mkdir()
    own_registry(package / "features.py", SOUND)
    source = "shop_of_the_tests.features:REGISTRY"
    assert "put its directory on PYTHONPATH (the current one is not searched)" in problem(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_contract(Settings(features=source)).registry.names == ("probe",)


def test_operators_directory_stays_as_it_is(own: str, tmp_path: Path) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX") and not name.startswith("PROFILES_")
    }
    environment |= {"PROFILES_FEATURES": own, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "app", "features", "--format", "json"]
    subprocess.run(command, env=environment, cwd="/", check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


# --- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "invalid syntax ({path}, line 1)"),
        ("x = '\0'", "source code string cannot contain null bytes ({path}, line 1)"),
        ("\nx = 1\n1 / 0\n", "ZeroDivisionError: division by zero ({path}, line 3)"),
        ("def f():\n    raise ValueError('a\\nb')\n\nf()\n", "ValueError: a b ({path}, line 4)"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ({path}, line 1)"),
        ("open('/nowhere/at/all')\n", "FileNotFoundError: [Errno 2] No such file"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 ({path}, line 2)"),
    ],
)
def test_module_fault_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    shown = problem(f"{path}:REGISTRY")
    assert shown.startswith(f"PROFILES_FEATURES: cannot load {path}: {message.format(path=path)}")


def test_fault_of_an_imported_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_the_tests.py").write_text("x = 1\nx.y\n")
    (tmp_path / "own.py").write_text("\n\n\nimport helper_of_the_tests\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert problem(f"{tmp_path}/own.py:REGISTRY").endswith(f"({tmp_path}/helper_of_the_tests.py, line 2)")


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    assert problem(f"{tmp_path}/no.py:X").endswith(f"/no.py: No such file or directory: {tmp_path}/no.py")
    (tmp_path / "dir.py").mkdir()
    assert "Is a directory" in problem(f"{tmp_path}/dir.py:X")
    (tmp_path / "loop.py").symlink_to("loop.py")
    assert "Too many levels of symbolic links" in problem(f"{tmp_path}/loop.py:X")


def test_unreadable_file_is_named(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:  # as the system does, but not to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert problem(own).endswith(f"own.py: Permission denied: {tmp_path}/own.py")


def test_registries_of_the_module_are_named_when_the_name_is_wrong(own: str, tmp_path: Path) -> None:
    appended(own, "\nOTHER = Registry([*REGISTRY])\nNUMBER = 3\n")
    path = tmp_path / "own.py"
    there = "registries in it: REGISTRY, OTHER"
    assert problem(f"{path}:REGISTER") == f"PROFILES_FEATURES: in {path}, there is no REGISTER; {there}"
    assert problem(f"{path}:NUMBER") == f"PROFILES_FEATURES: in {path}, NUMBER is of type int; {there}"
    assert problem("json:REGISTRY") == "PROFILES_FEATURES: in json, there is no REGISTRY; registries in it: none"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("window=timedelta(days=30),", "", "Missing required argument 'window'"),
        ("dtype='int'", "dtype='integer'", "feature 'probe': unknown dtype 'integer'; allowed are float, int, str"),
        ("days=30", "days=0", "feature 'probe': the window must be positive"),
        ("views", "tip_views", "feature 'probe': the SQL may read only the relations views and feedback"),
        ("days=30", "days=300", "PROFILES_RETENTION_DAYS: must be at least 330"),
        ("[\n", "[3,\n", "feature '3': an entry must be a Feature"),
        ("Registry([", "Registry([] and [", "the registry: it must hold 1 to 62 features, not 0"),
    ],
)
def test_entry_that_breaks_a_rule_is_named(own: str, old: str, new: str, message: str) -> None:
    path = Path(own.partition(":")[0])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert message in problem(own)


def test_mirror_is_refused_when_it_is_no_struct(own: str) -> None:
    shown = problem(appended(own, "\nProfileFeatures = dict\n"))
    assert shown == f"the registry: ProfileFeatures in {own.partition(':')[0]} must be a msgspec.Struct"
