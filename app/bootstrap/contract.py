"""Loads the contract of a deployment (feature registry and typed Struct) and compiles the features' SQL on SQLite."""

from __future__ import annotations

from app.features.contract import Contract, import_registry
from app.features.definitions import REGISTRY
from app.features.schema import ProfileFeatures, check_mirror, mirror_of
from app.settings import Settings
from app.stores.sqlite.features import compile_registry


def load_contract(settings: Settings, source: str | None = None, *, own_mirror: bool = True) -> Contract:
    """Load and check a feature registry and its mirror, the Struct with one typed field per feature.

    The registry is the one at `source`, or else the one that the settings name, or else the built-in one. With
    `own_mirror=False` the mirror is derived from the registry, because the declared mirror may be out of date. Raises
    `RegistryError` if an entry breaks a rule or the mirror differs from the registry, and `SettingsError` if the
    registry cannot be loaded, or events or decisions could be deleted while they are needed.
    """
    if source is not None:
        registry, mirror = import_registry(source, "--registry")
    elif settings.features is not None:
        registry, mirror = import_registry(settings.features, "PROFILES_FEATURES")
    else:
        registry, mirror = REGISTRY, ProfileFeatures
    compiled = compile_registry(registry)
    if mirror is None or not own_mirror:
        mirror = mirror_of(compiled)
    check_mirror(compiled, mirror)
    settings.require_retention(compiled.longest_window_ms())
    return Contract(compiled, mirror)
