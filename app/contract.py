"""What a deployment serves: the registry, and the mirror that consumers type against."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from app.features.definitions import REGISTRY
from app.features.registry import Registry
from app.features.schema import ProfileFeatures, check_mirror
from app.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The two of them; a test hands in its own."""

    registry: Registry = REGISTRY
    mirror: type[msgspec.Struct] = ProfileFeatures


def check_contract(contract: Contract, settings: Settings) -> None:
    """Raise `RegistryError` or `SettingsError` where registry, mirror and settings do not fit together."""
    check_mirror(contract.registry, contract.mirror)
    settings.require_retention(contract.registry.longest_window.days)
    settings.require_decision_retention()
