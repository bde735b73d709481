"""Makes the structs of API responses from objects whose attributes have the names of the structs' fields."""

from typing import Any, TypeVar

import msgspec

from app.features.clock import rfc3339

T = TypeVar("T", bound=msgspec.Struct)


def view(kind: type[T], *sources: object, **others: Any) -> T:
    """Make a struct of the type `kind`. Each field is taken from `others`, else from the first of the `sources` that
    has an attribute of the same name. An attribute `x_ms` (epoch ms) gives the field `x` the time as RFC 3339."""
    for source in sources:
        for name in kind.__struct_fields__:
            if name not in others and hasattr(source, f"{name}_ms"):
                moment_ms = getattr(source, f"{name}_ms")
                others[name] = None if moment_ms is None else rfc3339(moment_ms)
            elif name not in others and hasattr(source, name):
                others[name] = getattr(source, name)
    return kind(**others)
