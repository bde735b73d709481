"""Exports the names and types of the features for other programs, as JSON Schema, Python or TypeScript."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from app.features.registry import Dtype, Feature, Registry

_TYPESCRIPT: dict[Dtype, str] = {"float": "number", "int": "number", "str": "string"}
LINE = 120


def json_schema(_: Registry, mirror: type[msgspec.Struct]) -> str:
    """JSON Schema, draft 2020-12, of the Struct `mirror`, which declares the features of the registry."""
    return json.dumps(msgspec.json.schema(mirror), indent=2) + "\n"


def python(registry: Registry, mirror: type[msgspec.Struct]) -> str:
    """Source of a Python module that declares the features as a msgspec Struct, with their fingerprints. Consumers
    import the module unchanged. Operators can copy the Struct into the module of their registry."""
    lines = [
        '"""Features of a user, as the profile service serves them. Written by `profiles features --format python`."""',
        "",
        "from typing import Annotated, ClassVar",
        "",
        "from msgspec import UNSET, Meta, Struct, UnsetType",
        "",
        "",
        f"class {mirror.__name__}(Struct, kw_only=True, frozen=True):",
        '    """A feature is UNSET if it was not asked for, and None if nothing is known."""',
        "",
        *map(mirror_line, registry),
        "    FINGERPRINTS: ClassVar[dict[str, str]] = {",
        *(f'        "{entry.name}": "{entry.fingerprint}",' for entry in registry),
        "    }",
    ]
    return "\n".join(lines) + "\n"


def mirror_line(entry: Feature) -> str:
    """Source of the Struct field that declares a feature, in lines of at most `LINE` characters as ruff formats it."""
    declared, text = f"{entry.dtype} | UnsetType | None", json.dumps(entry.description, ensure_ascii=False)
    line = f"    {entry.name}: Annotated[{declared}, Meta(description={text})] = UNSET"
    if len(line) <= LINE:
        return line
    meta = f"        Meta(description={text}),"
    if len(meta) > LINE:
        meta = f"        Meta(\n            description={text}\n        ),"
    return f"    {entry.name}: Annotated[\n        {declared},\n{meta}\n    ] = UNSET"


def typescript(registry: Registry, mirror: type[msgspec.Struct]) -> str:
    """Source of a TypeScript module that declares the type of a profile with all features."""
    lines = [
        "// The features of a user, as the service serves them. Written by `profiles features --format typescript`.",
        "",
        f"export interface {mirror.__name__} {{",
    ]
    for entry in registry:
        text = entry.description.replace("*/", "*\\/")
        lines += [f"  /** {text} */", f"  {entry.name}: {_TYPESCRIPT[entry.dtype]} | null;"]
    lines += ["}", "", "/** A hash of the definition of each feature. */", "export const FINGERPRINTS = {"]
    lines += [f'  {entry.name}: "{entry.fingerprint}",' for entry in registry]
    return "\n".join([*lines, "} as const;"]) + "\n"


def catalogue_entry(entry: Feature) -> dict[str, Any]:
    """A feature's declaration without its SQL, as `GET /features` and `profiles features` show it."""
    return {
        "name": entry.name,
        "dtype": entry.dtype,
        "ttl_s": entry.ttl_ms / 1000,
        "window_s": entry.window_ms / 1000,
        "default": entry.default,
        "description": entry.description,
        "invalidated_by": list(entry.invalidated_by),
        "relations": list(entry.relations),
        "fingerprint": entry.fingerprint,
    }


FORMATS: dict[str, Callable[[Registry, type[msgspec.Struct]], str]] = {
    "json-schema": json_schema,
    "python": python,
    "typescript": typescript,
}
