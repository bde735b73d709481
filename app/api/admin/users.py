"""Routes to find, rebuild and erase users."""

from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from litestar import Response
from litestar.params import QueryParameter
from msgspec import Meta

from app.api.admin import admin_delete, admin_get, admin_post, audited, form_post
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest
from app.api.openapi import ID_PREFIX, UserId
from app.api.pages.negotiation import answer, page, prefers_page, redirect
from app.api.request_parsing import body_as, prefix_of
from app.api.schemas import DetailedProfileAnswer, FeatureNames
from app.events.ports import Holdings
from app.features.ids import id_problem, user_hash, visible
from app.features.registry import indices
from app.service import Service

HOME = "/admin/users"
FOUND, FOUND_MOST = 20, 100


class UsersFound(msgspec.Struct):
    """User ids that begin with `prefix`, in the order of their UTF-8 bytes. `more`: further ids exist."""

    prefix: str
    user_ids: list[str]
    more: bool


class UserRebuildRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request to rebuild the features of one user; default: all features."""

    features: FeatureNames | None = None


class UserHoldings(msgspec.Struct):
    """The numbers of records that erasing a user deletes, by kind."""

    user_id: str
    views: int
    feedback: int
    dead_letters: int
    rebuilds: Annotated[int, Meta(description="Ended rebuilds that name the user; the name is removed from them.")]
    decisions: Annotated[int, Meta(description="Stored decisions of /score.")]
    learned: Annotated[int, Meta(description="Decisions from which the learned state was made; all of it is deleted.")]
    cached: Annotated[int | None, Meta(description="Live values in the cache; null if the cache does not answer.")]


@admin_get(
    HOME,
    summary="Find users",
    description="Users with any event whose id begins with `prefix`. It is not a pattern; case matters. A browser "
    "gets a page; if `prefix` is the whole id of a user, it gets the page of that user.",
)
async def get_users(
    request: HttpRequest,
    prefix: Annotated[str, QueryParameter(description="Beginning of the ids, or empty.", schema_extra=ID_PREFIX)] = "",
    limit: Annotated[int | None, QueryParameter(ge=1, le=FOUND_MOST, description=f"Default: {FOUND}.")] = None,
) -> Response[UsersFound]:
    wanted, most = prefix_of(prefix), limit or FOUND
    found = await request.service.users.find(wanted, most + 1)
    body = UsersFound(wanted, found[:most], len(found) > most)
    if limit is None and found[:1] == [wanted] and prefers_page(request):
        return await redirect(request, f"{HOME}/{quote(wanted, safe='')}")
    return await answer(request, body, "users.html", most=FOUND_MOST, id_allowed=id_problem(wanted) is None)


@admin_post(
    f"{HOME}/{{user_id:str}}/rebuild",
    body=[UserRebuildRequest],
    body_required=False,
    summary="Rebuild a user now",
    description="Rebuilds every feature, or those that the body names. Reads return the cached values meanwhile.",
    response_description="The profile with its details.",
)
async def rebuild_user(request: HttpRequest, user_id: UserId) -> Response[DetailedProfileAnswer]:
    service = request.service
    if is_form(request):
        features = (await read_form(request)).getall("features", None)
    else:
        features = (await body_as(request, UserRebuildRequest)).features if await request.body() else None
    mask = service.registry.mask(features)
    names = {index: service.registry.names[index] for index in indices(mask)}
    before = await service.inspector.inspect([user_id], compute=False) if prefers_page(request) else []
    async with audited(request, "rebuild", user_hash(user_id)) as act:
        profile = (await service.rebuilder.rebuild([user_id], mask))[user_id]
        await service.clear_local_caches()
        if mask != service.registry.full_mask:
            act.outcome = "done: " + ", ".join(names.values())
    if not before:
        body: Any = request.parts.renderer.profile(user_id, profile, mask, detail=True)
        return Response(body)
    (inspection,) = before
    rows = [(name, inspection.cells[index].held, profile[index]) for index, name in names.items()]
    return await page(
        request,
        "user_rebuilt.html",
        user_id=user_id,
        rows=rows,
        cache_unavailable=inspection.cache == "away",
        changed={name for name, old, new in rows if old and old.json != new.json},
        kept=any(new.expires_at_ms is not None for _, _, new in rows),
    )


@admin_get(
    f"{HOME}/{{user_id:str}}/erase",
    summary="See what erasing a user would delete",
    description="This deletes nothing. `DELETE /admin/users/{user_id}` erases.",
)
async def get_erasure(request: HttpRequest, user_id: UserId) -> Response[UserHoldings]:
    return await answer(request, await _holdings(request.service, user_id), "user_erase.html", refusal=None)


@form_post(f"{HOME}/{{user_id:str}}/erase/confirm")
async def erase_user_by_form(request: HttpRequest, user_id: UserId) -> Response[Any]:
    """Erase a user if the admin has typed the user's id into the form, to confirm; otherwise show the form again."""
    if (await read_form(request)).get("confirm") not in (user_id, visible(user_id)):
        refusal = "Nothing was deleted: this is not the id of the user. Capitals and spaces matter."
        body = await _holdings(request.service, user_id)
        return await answer(request, body, "user_erase.html", status_code=422, refusal=refusal)
    erased = await _erase(request, user_id)
    return await page(request, "user_erased.html", user_id=user_id, erased=erased, hashed=user_hash(user_id))


@admin_delete(
    f"{HOME}/{{user_id:str}}",
    summary="Erase a user",
    description="Deletes the user's events, decisions, learned state, dead letters and cached values for good, and "
    "their events in jobs that wait in the queue. The audit trail keeps a hash of the id.",
)
async def erase_user(request: HttpRequest, user_id: UserId) -> None:
    await _erase(request, user_id)


async def _holdings(service: Service, user_id: str) -> UserHoldings:
    (inspection,) = await service.inspector.inspect([user_id], compute=False)
    cached = sum(cell.held is not None for cell in inspection.cells) if inspection.cache != "away" else None
    return UserHoldings(user_id, *await service.users.holdings(user_id), cached)


async def _erase(request: HttpRequest, user_id: str) -> Holdings:
    async with audited(request, "erase", user_hash(user_id)) as act:
        erased = await request.service.erasure.erase(user_id)
        act.outcome = f"done, {erased.events} events"
    return erased
