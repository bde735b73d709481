"""What the OpenAPI document says of parameters where a handler's signature cannot.

A route names them in `opt["schemas"]`: a schema, or what makes one from the registry. `opt["required"]` lists
those that only a page may leave out. Invariant: a value that these schemas allow is refused only for what no schema can
say (a moment that lies too far back, two parameters that exclude each other).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from app.features.ids import ID_PATTERN, MAX_ID_LENGTH
from app.features.registry import Registry

Schema = dict[str, Any]
Schemas = Mapping[str, Schema | Callable[[Registry], Schema]]
MAX_ROWID = 2**63 - 1

USER_ID: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH, "pattern": ID_PATTERN}
USER_ID_OR_NONE: Schema = {"anyOf": [USER_ID, {"const": ""}]}
ID_PREFIX: Schema = {"type": "string", "maxLength": MAX_ID_LENGTH, "pattern": r"^[^/\x00-\x1f\x7f-\x9f]*$"}
MOMENT: Schema = {"type": "string", "format": "date-time", "examples": ["2026-04-25T08:30:00+02:00"]}


def rowid(least: int) -> Schema:
    """A number of a row. Litestar writes limits as floats, which cannot hold this one."""
    return {"type": "integer", "minimum": least, "maximum": MAX_ROWID}


def feature_name(registry: Registry) -> Schema:
    """One feature."""
    return {"type": "string", "enum": list(registry.names)}


def feature_names(registry: Registry) -> Schema:
    """Features, with commas."""
    either = "|".join(registry.names)
    return {"type": "string", "pattern": f"^({either})(,({either}))*$"}


def describe(operation: dict[str, Any], opt: Mapping[str, Any], registry: Registry) -> None:
    """Put the schemas of `opt` into an operation; what stands there of description and default stays."""
    schemas: Schemas = opt.get("schemas", {})
    for parameter in operation.get("parameters", ()):
        found = schemas.get(parameter["name"])
        if parameter["in"] == "path" and parameter["name"] == "user_id":
            found = USER_ID
        if found is not None:
            kept = {name: parameter["schema"][name] for name in ("default",) if name in parameter["schema"]}
            parameter["schema"] = {**(found(registry) if callable(found) else found), **kept}
        if parameter["name"] in opt.get("required", ()):
            parameter["required"] = True
            parameter["schema"].pop("default", None)


def name_features(schema: Schema, registry: Registry) -> None:
    """In a request's body: what `features` may hold."""
    for branch in schema.get("properties", {}).get("features", {}).get("anyOf", ()):
        if branch.get("type") == "array":
            branch["items"] = feature_name(registry)
