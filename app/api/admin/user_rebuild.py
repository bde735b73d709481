"""Admins' route that rebuilds one user's features, all or some."""

from __future__ import annotations

from litestar import MediaType, Response, post
from litestar.openapi.datastructures import ResponseSpec

from app.api.admin.actors import caller, user_hash
from app.api.admin.user_schemas import UserRebuildRequest
from app.api.context import Api, HttpRequest, api_of, selected
from app.api.documents import ProfileAnswer, UserId, problems
from app.api.inputs import body_as, check_ids
from app.api.profiles import renderer
from app.features.registry import indices
from app.profiles.filling import Profile


@post(
    "/admin/users/{user_id:str}/rebuild",
    status_code=200,
    opt={"scope": "admin", "body": [UserRebuildRequest], "body_required": False},
    tags=["Admin"],
    summary="Rebuild a user now",
    description="Every feature, or those the body names. Readers stay on the held values meanwhile.",
    responses={
        200: ResponseSpec(ProfileAnswer, generate_examples=False, description="The profile, as with `detail=true`."),
        **problems(400, 401, 403, 413, 415, 422, 503),
    },
)
async def rebuild_user(request: HttpRequest, user_id: UserId) -> Response[bytes]:
    """Compute and cache features of one user."""
    api = api_of(request)
    check_ids([user_id], "user_id")
    wanted = await body_as(request, UserRebuildRequest) if await request.body() else UserRebuildRequest()
    mask = selected(api.registry, wanted.features)
    profile = await rebuild(api, user_id, mask, caller(request).name)
    return Response(renderer(api).profile(user_id, profile, mask, detail=True), media_type=MediaType.JSON)


async def rebuild(api: Api, user_id: str, mask: int, actor: str) -> Profile:
    """Rebuild, let every process forget what it keeps near, and audit with which features."""
    profiles = await api.rebuilder.rebuild([user_id], mask)
    await api.recall()
    names = ", ".join(api.registry.names[index] for index in indices(mask))
    await api.audit(
        actor, "rebuild", user_hash(user_id), "done" if mask == api.registry.full_mask else f"done: {names}"
    )
    return profiles[user_id]
