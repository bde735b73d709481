"""What a deployment serves: the registry, and the typed mirror of it. `PROFILES_FEATURES` names an operator's own."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from traceback import walk_tb
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


def load_contract(settings: Settings, source: str | None = None, *, own_mirror: bool = True) -> Contract:
    """The contract that the settings name, or `source` in their place, compiled and checked.

    Without `own_mirror` the module's mirror is not looked at: it may have to be written anew.

    Raises:
        RegistryError: an entry breaks a rule, or the mirror disagrees.
        SettingsError: the registry cannot be loaded, or the settings do not fit it.
    """
    if source is not None:
        registry, mirror = _load(source, "--registry")
    elif settings.features is not None:
        registry, mirror = _load(settings.features, SETTING)
    else:
        registry, mirror = REGISTRY, ProfileFeatures
    compiled = compile_registry(registry)
    contract = Contract(registry=compiled, mirror=mirror if mirror and own_mirror else mirror_of(compiled))
    check_contract(contract, settings)
    return contract


def check_contract(contract: Contract, settings: Settings) -> None:
    """Raise `RegistryError` or `SettingsError` if registry, mirror and settings do not fit together."""
    check_mirror(contract.registry, contract.mirror)
    settings.require_retention(contract.registry.longest_window_ms())
    settings.require_decision_retention()


def _load(source: str, setting: str) -> tuple[Registry, type[msgspec.Struct] | None]:
    place, _, name = source.rpartition(":")
    try:
        module = (
            _from_file(Path(place).expanduser().absolute()) if place.endswith(".py") else importlib.import_module(place)
        )
    except RegistryError:
        raise
    except (Exception, SystemExit) as error:  # whatever an operator's module raises is a fault of that module
        raise SettingsError(setting, f"cannot load {place}: {_explained(error, place)}") from error
    registry = getattr(module, name, None)
    if not isinstance(registry, Registry):
        problem = f"{name} is of type {type(registry).__name__}" if hasattr(module, name) else f"there is no {name}"
        found = [key for key, value in vars(module).items() if isinstance(value, Registry)]
        raise SettingsError(setting, f"in {place}, {problem}; registries in it: {', '.join(found) or 'none'}")
    mirror = getattr(module, ProfileFeatures.__name__, None)
    if mirror is not None and not (isinstance(mirror, type) and issubclass(mirror, msgspec.Struct)):
        raise RegistryError("*", f"{ProfileFeatures.__name__} in {place} must be a msgspec.Struct")
    return registry, mirror


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module. No bytecode is written beside it: an operator's directory stays as it is."""
    name = f"profiles_features_{sha256(str(path).encode()).hexdigest()[:8]}"
    code = compile(path.read_bytes(), path, "exec")
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # types are looked up there by the name of their module
    try:
        exec(code, module.__dict__)  # noqa: S102  # what importing it would do
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _explained(error: BaseException, place: str) -> str:
    """The error in one line, with the file and the line that raised it."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        frames, text = [(error.filename or place, error.lineno or 1)], error.msg
    elif isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
        text = (
            f"there is no module {error.name!r}; put its directory on PYTHONPATH (the current one is not searched), or "
            "name the file, as /path/features.py:NAME"
        )
    elif isinstance(error, OSError) and not frames:
        text = f"{error.strerror}: {error.filename}"
    return " ".join(text.split()) + (f" ({frames[-1][0]}, line {frames[-1][1]})" if frames else "")
