"""Loads the features of a deployment: a registry, and its *mirror*, the Struct that declares them for consumers."""

import importlib
import sys
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import NamedTuple

import msgspec

from app.errors import RegistryError, SettingsError
from app.features.registry import Registry
from app.features.schema import ProfileFeatures


class Contract(NamedTuple):
    """The features of a deployment: a compiled registry, and the msgspec Struct that mirrors it."""

    registry: Registry
    mirror: type[msgspec.Struct]


def import_registry(source: str, setting: str) -> tuple[Registry, type[msgspec.Struct] | None]:
    """Import a registry, which is not compiled yet, from `module:NAME` or `/path/features.py:NAME`; and its mirror, the
    Struct `ProfileFeatures` of the module, if it has one. Errors name `setting` as the origin of `source`.

    Raises:
        RegistryError: an entry breaks a rule, or the mirror is not a Struct.
        SettingsError: the module cannot be imported, or `NAME` in it is not a registry.
    """
    place, _, name = source.rpartition(":")
    try:
        with redirect_stdout(sys.stderr):  # a command's standard output may be read by a program
            module = _run_file(place) if place.endswith(".py") else importlib.import_module(place)
    except RegistryError:
        raise
    except (Exception, SystemExit) as error:  # an operator's module can raise anything
        raise SettingsError(setting, f"cannot load {place}: {_explanation(error, place)}") from error
    registry = getattr(module, name, None)
    if not isinstance(registry, Registry):
        problem = f"{name} is of type {type(registry).__name__}" if hasattr(module, name) else f"there is no {name}"
        found = [key for key, value in vars(module).items() if isinstance(value, Registry)]
        raise SettingsError(setting, f"in {place}, {problem}; registries in it: {', '.join(found) or 'none'}")
    mirror = getattr(module, ProfileFeatures.__name__, None)
    if mirror is not None and not (isinstance(mirror, type) and issubclass(mirror, msgspec.Struct)):
        raise RegistryError("*", f"{ProfileFeatures.__name__} in {place} must be a msgspec.Struct")
    return registry, mirror


def _run_file(place: str) -> ModuleType:
    """Run a Python file as a module, without writing bytecode into the operator's directory."""
    path = Path(place).expanduser().absolute()
    name = f"profiles_features_{sha256(str(path).encode()).hexdigest()[:8]}"
    code = compile(path.read_bytes(), path, "exec")
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # msgspec looks up annotations in the module of a Struct
    try:
        exec(code, module.__dict__)  # noqa: S102  # as an import would
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _explanation(error: BaseException, place: str) -> str:
    """An import error in one line, with the file and line of the module that raised it."""
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        lines, text = [(error.filename or place, error.lineno or 1)], error.msg
    elif isinstance(error, ModuleNotFoundError) and error.name and f"{place}.".startswith(f"{error.name}."):
        text = (
            f"there is no module {error.name!r}; put its directory on PYTHONPATH (the current one is not searched), or "
            "name the file, as /path/features.py:NAME"
        )
    elif isinstance(error, OSError) and not lines:
        text = f"{error.strerror}: {error.filename}"
    return " ".join(text.split()) + (f" ({lines[-1][0]}, line {lines[-1][1]})" if lines else "")
