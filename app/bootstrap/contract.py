"""Loads the contract of a deployment and compiles it on the database engine in use."""

from __future__ import annotations

from app.features.contract import Contract, import_registry
from app.features.definitions import REGISTRY
from app.features.schema import ProfileFeatures, mirror_of
from app.settings import Settings
from app.stores.sqlite.feature_check import compile_registry


def load_contract(settings: Settings, source: str | None = None, *, own_mirror: bool = True) -> Contract:
    """Load and check the registry in `source`, or else the one in the settings, or else ours.

    With `own_mirror=False` the mirror is derived from the registry, because the module's own may be out of date.

    Raises:
        RegistryError: an entry breaks a rule, or the mirror disagrees.
        SettingsError: the registry cannot be loaded, or the retention is shorter than its longest window.
    """
    if source is not None:
        registry, mirror = import_registry(source, "--registry")
    elif settings.features is not None:
        registry, mirror = import_registry(settings.features, "PROFILES_FEATURES")
    else:
        registry, mirror = REGISTRY, ProfileFeatures
    compiled = compile_registry(registry)
    contract = Contract(registry=compiled, mirror=mirror if mirror and own_mirror else mirror_of(compiled))
    contract.check(settings)
    return contract
