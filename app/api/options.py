"""`OPTIONS` where a path has several handlers.

Litestar makes an answer of its own for each path, and makes it from the first handler: it would tell of `POST` where
there is `GET` too. These must be registered before the handlers that they speak for.
"""

from __future__ import annotations

from collections.abc import Sequence

from litestar import Response, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler


def options_of(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """A handler for each path that several of these share."""
    methods: dict[str, list[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, []).extend(handler.http_methods)
    return [_options(path, allowed) for path, allowed in methods.items() if len(allowed) > 1]


def _options(path: str, methods: Sequence[str]) -> HTTPRouteHandler:
    allowed = ", ".join(sorted([*methods, "OPTIONS"]))

    @route(path, http_method=[HttpMethod.OPTIONS], status_code=204, include_in_schema=False)
    async def options() -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allowed})

    return options
