"""The route and page of the API keys: their scopes and last uses."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Response
from msgspec import Meta

from app.api.admin import admin_get
from app.api.dependencies import HttpRequest, service_of
from app.api.pages.negotiation import answer
from app.features.clock import rfc3339


class KeyView(msgspec.Struct):
    """An API key of `PROFILES_API_KEYS`."""

    name: str
    scopes: list[str]
    last_used: Annotated[str | None, Meta(description="Null: never. Other processes report after ten seconds.")]


class KeysView(msgspec.Struct):
    """The API keys that this process accepts, in the order of their names."""

    keys: list[KeyView]


@admin_get(
    "/admin/keys",
    summary="List the API keys",
    description="Name, scopes and last use of every configured key. The keys themselves are not known to the service. "
    "A page for a browser.",
)
async def get_keys(request: HttpRequest) -> Response[KeysView]:
    service, state = service_of(request), request.app.state
    stored_ms = await state.key_uses.newest_ms()
    # What this process has not stored yet was used within the last seconds.
    used_ms = {**stored_ms, **dict.fromkeys(state.authenticator.used, service.clock.now_ms())}
    found = [
        KeyView(key.name, sorted(key.scopes), rfc3339(used_ms[key.name]) if key.name in used_ms else None)
        for key in sorted(service.settings.api_keys, key=lambda key: str(key.name))
    ]
    return await answer(request, KeysView(found), "keys.html")
