"""The allowed methods of each path, for `OPTIONS` and the header `Allow` of a 405.

Litestar's own list covers only the first handler of a path, includes methods for HTML forms, and lacks HEAD.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from litestar import Response, route
from litestar.enums import HttpMethod
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler

from app.api.dependencies import HttpRequest

ALLOW = "allow"
_TYPE = re.compile(r":\w+}")


def options_of(handlers: Sequence[HTTPRouteHandler]) -> HTTPRouteHandler:
    """A handler that answers `OPTIONS` for all paths of `handlers`, before which it must be registered. It is a single
    handler, because each one takes 0.1 ms at start-up."""
    documented: dict[str, set[str]] = {}
    forms: dict[str, set[str]] = {}
    for handler in handlers:
        methods = forms if handler.include_in_schema is False else documented
        for path in handler.paths:
            methods.setdefault(path, set()).update(handler.http_methods)
    found = {**forms, **documented}
    allowed = {_TYPE.sub("}", path): _listed(methods) for path, methods in found.items()}

    @route([*found], http_method=[HttpMethod.OPTIONS], status_code=204, include_in_schema=False, opt={ALLOW: allowed})
    async def options(request: HttpRequest) -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allowed[request.scope["path_template"]]})

    return options


def allow_of(handler: BaseRouteHandler, path_template: str, default: str) -> str:
    """The value of the header `Allow` for a path whose `OPTIONS` handler is `handler`. If `options_of` has not made the
    handler, the value is `default`, which is Litestar's value, completed with HEAD and OPTIONS."""
    return str(handler.opt.get(ALLOW, {}).get(path_template) or _listed({*default.split(", ")}))


def _listed(methods: set[str]) -> str:
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))
