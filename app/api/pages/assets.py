"""The pages' own style sheet and script, from this package; browsers ask whether they changed."""

from __future__ import annotations

from pathlib import Path

from litestar import Router
from litestar.datastructures import CacheControlHeader
from litestar.static_files import create_static_files_router

ASSETS = "/admin/static"


def pages_assets() -> Router:
    """Serves them; they tell nothing about anybody, so they need no key."""
    return create_static_files_router(
        path=ASSETS,
        directories=[Path(__file__).parent / "static"],
        include_in_schema=False,
        cache_control=CacheControlHeader(no_cache=True),
    )
