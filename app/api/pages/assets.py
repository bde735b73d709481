"""The style sheets and scripts of the pages. They are served without a key, since they hold no data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from litestar import Router
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader
from litestar.exceptions import NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.static_files import create_static_files_router

ASSETS = "/admin/static"
_NAME = re.compile(r"/?[A-Za-z0-9_][A-Za-z0-9._\-]{0,99}")


def plain_name(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Litestar guard: answer 404 to a name that no file can have. Litestar's router would answer 500."""
    if not _NAME.fullmatch(str(connection.path_params["file_path"])):
        raise NotFoundException


def static_files(path: str, directory: Path, **options: Any) -> Router:
    """The router of a directory with files for browsers."""
    return create_static_files_router(
        path=path, directories=[directory], include_in_schema=False, guards=[plain_name], **options
    )


def pages_assets() -> Router:
    """The router of the pages' files. Browsers cache them, but ask every time whether they have changed."""
    return static_files(ASSETS, Path(__file__).parent / "static", cache_control=CacheControlHeader(no_cache=True))
