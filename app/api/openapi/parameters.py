"""Parameter schemas that a handler's signature cannot express, such as the enumeration of the registry's feature names.

`opt["schemas"]` of a route maps the name of a parameter to a schema, or to a function that makes one from the registry.
`opt["required"]` lists parameters that a program must send. The signature makes them optional, because the same route
also serves an HTML page that opens without them.
Invariant: a parameter that matches its schema is rejected only for reasons that no schema can express (a moment too far
in the past, two parameters that exclude each other).
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
CACHE_CONTROL: Schema = {
    "name": "Cache-Control",
    "in": "header",
    "required": False,
    "description": "With `stale-if-error=N` (RFC 5861), a request that would be answered 503 because the database does "
    "not answer gets cached values, if all were computed at most N seconds ago and have not expired. They may lack "
    "events of these N seconds, and the response says so in `Cache-Status`. Other directives are ignored.",
    "schema": {"type": "string", "examples": ["stale-if-error=60"]},
}
UNPROVEN_HEADERS: Schema = {
    "Cache-Status": {
        "description": "`profiles; hit; detail=unproven` (RFC 9211) if the values come from the cache while the "
        "database did not answer; otherwise absent.",
        "schema": {"type": "string"},
    },
    "Age": {
        "description": "Together with `Cache-Status`: the age of the oldest value in seconds.",
        "schema": {"type": "integer", "minimum": 0},
    },
}


def rowid(least: int) -> Schema:
    """The schema of a row id. Litestar would convert the maximum to a float, which rounds it."""
    return {"type": "integer", "minimum": least, "maximum": MAX_ROWID}


def feature_name(registry: Registry) -> Schema:
    return {"type": "string", "enum": list(registry.names)}


def feature_names(registry: Registry) -> Schema:
    """The schema of comma-separated feature names."""
    either = "|".join(registry.names)
    return {"type": "string", "pattern": f"^({either})(,({either}))*$"}


def describe(operation: dict[str, Any], opt: Mapping[str, Any], registry: Registry) -> None:
    """Replace the schemas of an operation's parameters with those in `opt`, but keep the defaults. With
    `opt["stale_if_error"]`, add the headers of `Cache-Control: stale-if-error`."""
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
    if opt.get("stale_if_error"):
        others = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] != "header"]
        operation["parameters"] = [*others, CACHE_CONTROL]  # not appended: Litestar keeps the document
        operation["responses"]["200"]["headers"] = UNPROVEN_HEADERS


def name_features(schema: Schema, registry: Registry) -> None:
    """Restrict `features` in the schema of a request body to the names of the registry."""
    for branch in schema.get("properties", {}).get("features", {}).get("anyOf", ()):
        if branch.get("type") == "array":
            branch["items"] = feature_name(registry)
