"""Writes features as text for other programs (JSON Schema, Python, TypeScript), and the source of a new feature."""

import json
from collections.abc import Callable
from datetime import timedelta
from textwrap import indent
from typing import Any, cast

import msgspec

from app.features.clock import spoken
from app.features.registry import Dtype, Feature, Registry, Scalar

_TYPESCRIPT: dict[Dtype, str] = {"float": "number", "int": "number", "str": "string"}
LINE = 120


def python(registry: Registry, mirror: type[msgspec.Struct]) -> str:
    """Source of a module that declares the features as a msgspec Struct, with their fingerprints. Consumers import it
    unchanged. Operators can copy the Struct into the module of their registry."""
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
    """Source of the Struct field that declares a feature, as ruff formats it."""
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
    "json-schema": lambda _, mirror: json.dumps(msgspec.json.schema(mirror), indent=2) + "\n",
    "python": python,
    "typescript": typescript,
}


# Lines of at most 88 characters and trailing commas, so that the formatter does not change the text.
_MODULE = '''\
# This file is a registry. To extend another registry, copy the entry and add its name.
from datetime import timedelta

from app.features.examples import Example, {event}
from app.features.registry import Feature, Registry

{constant} = Feature(
    name={name},
    dtype={dtype},
    ttl={ttl},
    window={window},
    description={description},
{default}    compute="""
{compute}
    """,
    examples=[
        Example(
            events=[
{events}
            ],
            value={value},
        ),
    ],
)

REGISTRY = Registry([{constant}])

# Its line in the mirror, if the registry has one (a class ProfileFeatures beside it):
{mirror}
'''


# By dtype: the SQL of the value, the description, the default, and the value for the events of the example.
_SKETCHES: dict[str, tuple[str, str, Scalar, Scalar]] = {
    "float": (
        "COUNT(*) / CAST(COUNT(DISTINCT tip_id) AS DOUBLE PRECISION)",
        "The number of {rows} in the last {window}, divided by the number of tips.",
        None,
        1.5,
    ),
    "int": ("COUNT(*)", "The number of {rows} in the last {window}.", 0, 3),
    "str": ("MAX(tip_id)", "The highest id of a tip among the {rows} in the last {window}.", None, "b"),
}
# By relation: what its rows are, and an event of the example.
_ROWS = {
    "feedback": ("reactions of the user to tips", 'feedback("completed", tip_id="{tip}", ago={ago})'),
    "views": ("tips served to the user", 'served(tip_id="{tip}", ago={ago})'),
}


def scaffold(name: str, relation: str, dtype: str, window: timedelta, ttl: timedelta) -> str:
    """Source of a Python module that declares a registry with one feature that reads `relation`, with an example. A
    comment at the end has the field for a mirror. Raises `RegistryError` if the name is not an identifier."""
    compute, description, default, value = _SKETCHES[dtype]
    rows, event = _ROWS[relation]
    entry = Feature(
        name=name,
        dtype=cast(Dtype, dtype),
        ttl=ttl,
        window=window,
        description=description.format(rows=rows, window=spoken(window)),
        compute=f"SELECT user_id, {compute} AS value\nFROM {relation}\nGROUP BY user_id",
        default=default,
    )
    Registry([entry])  # raises if a rule is broken
    events = [event.format(tip=tip, ago=_code(window / number)) for tip, number in (("a", 4), ("a", 3), ("b", 2))]
    return _MODULE.format(
        event=event.partition("(")[0],
        constant="REGISTRY_" if name.upper() == "REGISTRY" else name.upper(),
        name=json.dumps(name),
        dtype=json.dumps(dtype),
        ttl=_code(ttl),
        window=_code(window),
        description=json.dumps(entry.description, ensure_ascii=False),
        default="" if default is None else f"    default={json.dumps(default)},\n",
        compute=indent(entry.compute, " " * 8),
        events=indent(",\n".join(events), " " * 16) + ",",
        value=json.dumps(value),
        mirror=indent(mirror_line(entry), "#"),
    )


def _code(span: timedelta) -> str:
    count, unit = spoken(span).split()
    return f"timedelta({unit.removesuffix('s')}s={count})"
