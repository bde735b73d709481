"""What a deployment serves: the registry, and the typed mirror of it. `PROFILES_FEATURES` names an operator's own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import msgspec

from app.errors import RegistryError, SettingsError
from app.features.definitions import REGISTRY
from app.features.registry import Registry
from app.features.schema import ProfileFeatures, check_mirror, mirror_of
from app.settings import Settings
from app.stores.sqlite.feature_check import compile_registry

SETTING = "PROFILES_FEATURES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """A compiled registry and its mirror."""

    registry: Registry
    mirror: type[msgspec.Struct]


def load_contract(settings: Settings, source: str | None = None) -> Contract:
    """The contract that the settings name, or `source` in their place, compiled and checked.

    Raises:
        RegistryError: an entry breaks a rule, or the mirror disagrees.
        SettingsError: the registry cannot be loaded, or the settings do not fit it.
    """
    registry, mirror = _load(source or settings.features)
    compiled = compile_registry(registry)
    contract = Contract(registry=compiled, mirror=mirror or mirror_of(compiled))
    check_contract(contract, settings)
    return contract


def check_contract(contract: Contract, settings: Settings) -> None:
    """Raise `RegistryError` or `SettingsError` if registry, mirror and settings do not fit together."""
    check_mirror(contract.registry, contract.mirror)
    settings.require_retention(contract.registry.longest_window_ms())
    settings.require_decision_retention()


def _load(source: str | None) -> tuple[Registry, type[msgspec.Struct] | None]:
    if source is None:
        return REGISTRY, ProfileFeatures
    place, _, name = source.rpartition(":")
    module = _module(place)
    registry = getattr(module, name, None)
    if not isinstance(registry, Registry):
        found = [key for key, value in vars(module).items() if isinstance(value, Registry)]
        problem = f"is a {type(registry).__name__}, not a Registry" if hasattr(module, name) else "does not exist"
        hint = f"; the module has the registry {', '.join(found)}" if found else "; the module has no Registry"
        raise SettingsError(SETTING, f"{name} {problem} in {place}{hint}")
    mirror = getattr(module, ProfileFeatures.__name__, None)
    if mirror is not None and not (isinstance(mirror, type) and issubclass(mirror, msgspec.Struct)):
        raise RegistryError("*", f"{ProfileFeatures.__name__} in {place} must be a msgspec.Struct")
    return registry, mirror


def _module(place: str) -> ModuleType:
    try:
        return _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except RegistryError:
        raise
    except Exception as error:  # whatever an operator's module raises is a fault of that module
        raise SettingsError(SETTING, f"cannot load {place}: {_explained(error)}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()}")
    name = f"profiles_features_{sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # types are looked up there by the name of their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _explained(error: Exception) -> str:
    """The error in one line, with the line of the module that raised it."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    trace, line = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if trace.tb_frame.f_code.co_name == "<module>" and "importlib" not in file and file != __file__:
            line = f"line {trace.tb_lineno}: "
        trace = trace.tb_next
    return f"{line}{type(error).__name__}: {error}"
