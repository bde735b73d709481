"""The mirror for other languages: one contract, written out as JSON Schema, Python or TypeScript."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec

from app.features.registry import Dtype, Registry

_TYPESCRIPT: dict[Dtype, str] = {"float": "number", "int": "number", "str": "string"}


def json_schema(_: Registry, mirror: type[msgspec.Struct]) -> str:
    """JSON Schema (2020-12) of the mirror."""
    return json.dumps(msgspec.json.schema(mirror), indent=2) + "\n"


def python(registry: Registry, mirror: type[msgspec.Struct]) -> str:
    """A module with one TypedDict, which needs nothing but the standard library."""
    lines = ['"""Features of a user, as the profile service serves them. Generated; do not edit."""', ""]
    lines += ["from typing import TypedDict", "", "", f"class {mirror.__name__}(TypedDict, total=False):"]
    for entry in registry:
        lines += [f"    {entry.name}: {entry.dtype} | None", f'    """{entry.description}"""']
    return "\n".join(lines) + "\n"


def typescript(registry: Registry, mirror: type[msgspec.Struct]) -> str:
    """One interface."""
    lines = ["// Features of a user, as the profile service serves them. Generated; do not edit."]
    lines.append(f"export interface {mirror.__name__} {{")
    for entry in registry:
        lines += [f"  /** {entry.description} */", f"  {entry.name}?: {_TYPESCRIPT[entry.dtype]} | null;"]
    return "\n".join([*lines, "}"]) + "\n"


def catalogue(registry: Registry) -> list[dict[str, object]]:
    """The entries as consumers may see them: everything but the SQL."""
    return [
        {
            "name": entry.name,
            "dtype": entry.dtype,
            "ttl_s": entry.ttl.total_seconds(),
            "default": entry.default,
            "description": entry.description,
            "invalidated_by": list(entry.invalidated_by),
            "fingerprint": entry.fingerprint,
        }
        for entry in registry
    ]


FORMATS: dict[str, Callable[[Registry, type[msgspec.Struct]], str]] = {
    "json-schema": json_schema,
    "python": python,
    "typescript": typescript,
}
