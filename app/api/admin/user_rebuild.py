"""Admins' route that rebuilds one user's features, all or some."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from litestar import MediaType, Response, post
from litestar.openapi.datastructures import ResponseSpec

from app.api.admin.auditing import audited
from app.api.admin.user_schemas import UserRebuildRequest
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest, renderer_of, selected, service_of
from app.api.openapi.document import ProfileAnswer, UserId, problems
from app.api.pages.negotiation import page, prefers_page
from app.api.request_parsing import body_as, check_ids
from app.api.schemas import Value
from app.features.ids import user_hash
from app.features.registry import indices
from app.profiles.online.cache_protocol import FeatureValue, Profile


@post(
    "/admin/users/{user_id:str}/rebuild",
    status_code=200,
    opt={"scope": "admin", "body": [UserRebuildRequest], "body_required": False},
    tags=["Admin"],
    summary="Rebuild a user now",
    description="Every feature, or those the body names. Readers stay on the held values meanwhile.",
    responses={
        200: ResponseSpec(ProfileAnswer, generate_examples=False, description="The profile, as with `detail=true`."),
        **problems(400, 401, 403, 413, 415, 422, 503, 507),
    },
)
async def rebuild_user(request: HttpRequest, user_id: UserId) -> Response[Any]:
    """Compute and cache features of one user. A form gets a page with before and after."""
    service = service_of(request)
    check_ids([user_id], "user_id")
    mask = selected(service.registry, await _wanted(request))
    before = await service.inspector.live_values(user_id) if prefers_page(request) else None
    profile = await _rebuild(request, user_id, mask)
    if not prefers_page(request):
        return Response(renderer_of(request).profile(user_id, profile, mask, detail=True), media_type=MediaType.JSON)
    rows = [
        _row(service.registry.names[index], before[index] if before is not None else None, profile[index])
        for index in indices(mask)
    ]
    return await page(
        request,
        "user_rebuilt.html",
        user_id=user_id,
        rows=rows,
        away=before is None,
        kept=any(row.expires_at_ms is not None for row in rows),
        changed=sum(row.changed for row in rows),
    )


async def _wanted(request: HttpRequest) -> list[str] | None:
    if is_form(request):
        return (await read_form(request)).all("features") or None
    return (await body_as(request, UserRebuildRequest)).features if await request.body() else None


class RebuiltFeature(NamedTuple):
    """A feature before and after. `held`: whether there was a live value before."""

    name: str
    held: bool
    before: Value
    computed_at_ms: int | None
    after: Value
    expires_at_ms: int | None
    error: str | None
    changed: bool


def _row(name: str, before: FeatureValue | None, after: FeatureValue) -> RebuiltFeature:
    return RebuiltFeature(
        name,
        before is not None,
        msgspec.json.decode(before.json) if before is not None else None,
        before.computed_at_ms if before is not None else None,
        msgspec.json.decode(after.json),
        after.expires_at_ms,
        after.error,
        before is not None and before.json != after.json,
    )


async def _rebuild(request: HttpRequest, user_id: str, mask: int) -> Profile:
    """Rebuild, and let every process forget what it keeps near. The audit says with which features, if not with all."""
    service = service_of(request)
    async with audited(request, "rebuild", user_hash(user_id)) as act:
        profiles = await service.rebuilder.rebuild([user_id], mask)
        await service.clear_local_caches()
        if mask != service.registry.full_mask:
            act.outcome = "done: " + ", ".join(service.registry.names[index] for index in indices(mask))
    return profiles[user_id]
