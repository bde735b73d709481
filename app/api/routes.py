"""The route handlers of the service."""

from __future__ import annotations

from litestar.handlers import HTTPRouteHandler

from app.api import events, generation, operations, profiles
from app.api.admin import (
    audit_trail,
    dead_letters,
    features,
    keys,
    overview,
    quality,
    rebuilds,
    sign_in,
    user_view,
    users,
)

_ADMIN = (overview, users, user_view, quality, rebuilds, dead_letters, features, keys, audit_trail, sign_in)


def routes(*, scoring: bool) -> list[HTTPRouteHandler]:
    """All route handlers; without `scoring`, not those of decisions and of the roll-out, which import the bandit."""
    modules = [profiles, events, generation, *_ADMIN, operations]
    if scoring:
        from app.api import decision_log  # noqa: PLC0415
        from app.api import scoring as score  # noqa: PLC0415
        from app.api.admin import decisions, rollout  # noqa: PLC0415

        modules += [score, decision_log, decisions, rollout]
    return [handler for module in modules for handler in vars(module).values() if isinstance(handler, HTTPRouteHandler)]
