"""The allowed methods of each path, for `OPTIONS` and the header `Allow` of a 405.

Litestar's own list covers only the first handler of a path, includes methods for HTML forms, and lacks HEAD.
"""

from __future__ import annotations

from collections.abc import Sequence

from litestar import Response, route
from litestar.enums import HttpMethod
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler

ALLOW = "allow"


def options_of(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """An `OPTIONS` handler for each path. Register them before `handlers`."""
    documented: dict[str, set[str]] = {}
    forms: dict[str, set[str]] = {}
    for handler in handlers:
        methods = forms if handler.include_in_schema is False else documented
        for path in handler.paths:
            methods.setdefault(path, set()).update(handler.http_methods)
    return [_options(path, methods) for path, methods in {**forms, **documented}.items()]


def allow_of(handler: BaseRouteHandler, default: str) -> str:
    """The value of the header `Allow` for a path, given its `OPTIONS` handler and the value that Litestar made."""
    return str(handler.opt.get(ALLOW) or _listed({*default.split(", ")}))


def _options(path: str, methods: set[str]) -> HTTPRouteHandler:
    allowed = _listed(methods)

    @route(path, http_method=[HttpMethod.OPTIONS], status_code=204, include_in_schema=False, opt={ALLOW: allowed})
    async def options() -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allowed})

    return options


def _listed(methods: set[str]) -> str:
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))
