"""The mirror of the registry: a msgspec Struct that declares the same features, with types, for consumers. Start-up
compares the two. A field is absent (UNSET) if the request selected other features, and null if nothing is known."""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.errors import RegistryError
from app.features.registry import Dtype, Registry

Float = float | UnsetType | None
Int = int | UnsetType | None
Str = str | UnsetType | None


class ProfileFeatures(msgspec.Struct, kw_only=True, frozen=True):
    """A user's features over the last 30 days; null if nothing is known."""

    completion_rate_30d: Annotated[
        Float, Meta(description="Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1.")
    ] = UNSET
    dismiss_rate_30d: Annotated[
        Float, Meta(description="Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1.")
    ] = UNSET
    mean_dwell_ms_30d: Annotated[
        Float,
        Meta(
            description="Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known."
        ),
    ] = UNSET
    preferred_hour: Annotated[
        Int,
        Meta(
            description="Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days."
        ),
    ] = UNSET
    tip_volume_30d: Annotated[Int, Meta(description="How many tips the user was served over the last 30 days.")] = UNSET


_TYPES: dict[Dtype, Any] = {"float": Float, "int": Int, "str": Str}


def mirror_of(registry: Registry) -> type[msgspec.Struct]:
    """Make the mirror of a registry whose module declares none: a Struct with one field per feature."""
    fields = [
        (entry.name, Annotated[_TYPES[entry.dtype], Meta(description=entry.description)], UNSET) for entry in registry
    ]
    doc = {"__doc__": "A user's features; null if nothing is known."}
    return msgspec.defstruct(ProfileFeatures.__name__, fields, namespace=doc, kw_only=True, frozen=True)


_JSON_TYPES: dict[Dtype, str] = {"float": "number", "int": "integer", "str": "string"}


def check_mirror(registry: Registry, mirror: type[msgspec.Struct]) -> None:
    """Raise `RegistryError`, with the feature's name, if a side lacks a feature or its dtype or description differs."""
    _, components = msgspec.json.schema_components([mirror], schema_hook=lambda _: {})
    fields = components[mirror.__name__]["properties"]
    for name in fields.keys() - set(registry.names):
        raise RegistryError(name, f"it is in the mirror {mirror.__name__}, but not in the registry")
    for entry in registry:
        if (declared := fields.get(entry.name)) is None:
            raise RegistryError(entry.name, f"it is in the registry, but not in the mirror {mirror.__name__}")
        types = {str(item.get("type")) for item in declared.get("anyOf", [declared])} - {"null"}
        if types != {_JSON_TYPES[entry.dtype]}:
            found = " or ".join(sorted(types))
            raise RegistryError(entry.name, f"its dtype is {entry.dtype} in the registry, {found} in {mirror.__name__}")
        if declared.get("description") != entry.description:
            raise RegistryError(entry.name, f"its description in {mirror.__name__} differs from the registry's")
