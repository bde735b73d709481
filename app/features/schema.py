"""The typed mirror of the registry, which consumers type against: names, dtypes, descriptions, no compute.

A field is absent (UNSET) where a caller selected other features, and null where nothing is known. Start-up and a test
compare the mirror with the registry in both directions.
"""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType, inspect

from app.errors import RegistryError
from app.features.registry import Dtype, Registry

Float = float | None
Int = int | None
Str = str | None


class ProfileFeatures(msgspec.Struct, kw_only=True, frozen=True):
    """A user's features: declared behaviour over the last 30 days; null where nothing is known."""

    completion_rate_30d: Annotated[
        Float | UnsetType,
        Meta(description="Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1."),
    ] = UNSET
    dismiss_rate_30d: Annotated[
        Float | UnsetType,
        Meta(description="Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1."),
    ] = UNSET
    mean_dwell_ms_30d: Annotated[
        Float | UnsetType,
        Meta(
            description="Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known."
        ),
    ] = UNSET
    preferred_hour: Annotated[
        Int | UnsetType,
        Meta(
            description="Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days."
        ),
    ] = UNSET
    tip_volume_30d: Annotated[
        Int | UnsetType, Meta(description="How many tips the user was served over the last 30 days.")
    ] = UNSET


_TYPES: dict[Dtype, Any] = {"float": Float, "int": Int, "str": Str}


def mirror_of(registry: Registry) -> type[msgspec.Struct]:
    """A mirror made from the registry, for one that has none of its own."""
    fields = [
        (entry.name, Annotated[_TYPES[entry.dtype] | UnsetType, Meta(description=entry.description)], UNSET)
        for entry in registry
    ]
    doc = {"__doc__": "A user's features; null if nothing is known."}
    return msgspec.defstruct(ProfileFeatures.__name__, fields, namespace=doc, kw_only=True, frozen=True)


_DTYPE_OF = {inspect.FloatType: "float", inspect.IntType: "int", inspect.StrType: "str"}


def _dtype(declared: inspect.Type) -> str | None:
    members = declared.types if isinstance(declared, inspect.UnionType) else (declared,)
    kinds = {type(member) for member in members} - {inspect.NoneType}
    return _DTYPE_OF.get(kinds.pop()) if len(kinds) == 1 else None


def check_mirror(registry: Registry, mirror: type[msgspec.Struct]) -> None:
    """Compare both ways.

    Raises:
        RegistryError: naming the feature that one side lacks, or whose dtype or description differs.
    """
    described = inspect.type_info(mirror)
    assert isinstance(described, inspect.StructType)
    hints: dict[str, Any] = get_type_hints(mirror, include_extras=True)
    fields = {item.encode_name: item for item in described.fields}
    for name in fields.keys() - set(registry.names):
        raise RegistryError(name, f"the mirror {mirror.__name__} has it, the registry has not")
    for entry in registry:
        if entry.name not in fields:
            raise RegistryError(entry.name, f"the registry has it, the mirror {mirror.__name__} has not")
        declared = fields[entry.name].type
        if isinstance(declared, inspect.Metadata):
            declared = declared.type
        if (dtype := _dtype(declared)) != entry.dtype:
            raise RegistryError(entry.name, f"dtype {entry.dtype} in the registry, {dtype} in {mirror.__name__}")
        texts = [meta.description for meta in getattr(hints[fields[entry.name].name], "__metadata__", ())]
        if texts != [entry.description]:
            raise RegistryError(entry.name, f"the description in {mirror.__name__} differs from the registry's")
