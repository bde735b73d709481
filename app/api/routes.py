"""The route handlers of the service, and its static files for browsers."""

import re
from pathlib import Path
from typing import Any

from litestar import Router
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader
from litestar.exceptions import NotFoundException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.static_files import create_static_files_router

from app.api import events, generation, operations, profiles
from app.api.admin import audit_trail, dead_letters, features, overview, quality, rebuilds, sign_in, user_view, users


def routes(*, scoring: bool) -> list[HTTPRouteHandler]:
    """All route handlers; without `scoring`, all but those of decisions and the roll-out, which import the bandit."""
    modules = [profiles, events, generation, overview, users, user_view, quality, rebuilds, dead_letters, features]
    modules += [sign_in, audit_trail, operations]
    if scoring:
        from app.api import scoring as score  # noqa: PLC0415
        from app.api.admin import decisions, rollout  # noqa: PLC0415

        modules += [score, decisions, rollout]
    return [handler for module in modules for handler in vars(module).values() if isinstance(handler, HTTPRouteHandler)]


def static_files(path: str, directory: Path) -> Router:
    """The router of a directory with files that need no key. Browsers cache them, but ask whether they have changed."""
    no_cache = CacheControlHeader(no_cache=True)
    return create_static_files_router(path, [directory], guards=[_check_name], cache_control=no_cache)


def _check_name(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Litestar guard: answer 404 to a name that no file can have. Litestar's router would answer 500."""
    if not re.fullmatch(r"/?[A-Za-z0-9_][A-Za-z0-9._\-]{0,99}", str(connection.path_params["file_path"])):
        raise NotFoundException
