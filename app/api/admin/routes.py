"""`ADMIN_ROUTES`: all route handlers of this package. Signing in needs no scope, all other routes need `admin`."""

from __future__ import annotations

from litestar.handlers import HTTPRouteHandler

from app.api.admin import (
    audit_trail,
    dead_letters,
    features,
    keys,
    overview,
    quality,
    rebuilds,
    rollout,
    sign_in,
    user_view,
    users,
)

_MODULES = (overview, users, user_view, quality, rebuilds, rollout, dead_letters, features, keys, audit_trail, sign_in)
ADMIN_ROUTES = [
    handler for module in _MODULES for handler in vars(module).values() if isinstance(handler, HTTPRouteHandler)
]
