"""The registry of the tests, compiled, and its name for `PROFILES_FEATURES`; and modules with other registries."""

from pathlib import Path

from app.stores.sqlite.features import compile_registry
from tests.support import features
from tests.support.entries import COUNT_VIEWS

REGISTRY = compile_registry(features.REGISTRY)
FEATURES = f"{features.__file__}:REGISTRY"

MODULE = """
from datetime import timedelta
from app.features.examples import Example, feedback, served
from app.features.registry import Feature, Registry

REGISTRY = Registry([{entries}])
"""
ENTRY = """
    Feature(
        name={name!r}, dtype={dtype!r}, ttl=timedelta(hours=1), window=timedelta(days={days}),
        description="A feature of the tests.", compute={compute!r}, {more}
    ),"""


def own_entry(
    name: str = "probe", compute: str = COUNT_VIEWS, dtype: str = "int", days: int = 30, more: str = ""
) -> str:
    """The code of an entry. `more` is the code of further arguments."""
    return ENTRY.format(name=name, compute=compute, dtype=dtype, days=days, more=more)


def own_registry(path: Path, *entries: str) -> str:
    """Write a module with a registry of these entries; its name for `PROFILES_FEATURES`."""
    path.write_text(MODULE.format(entries="".join(entries)))
    return f"{path}:REGISTRY"
