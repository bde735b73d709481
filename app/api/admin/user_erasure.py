"""Admins' routes that erase one user, and say before what that would delete.

A browser is asked twice: the page of `GET …/erase` says what will go and wants the id typed, and only then does its
form erase.
"""

from __future__ import annotations

from typing import Any

from litestar import Response, delete, get, post

from app.api.admin.auditing import audited
from app.api.admin.user_schemas import UserHoldings
from app.api.auth.forms import read_form
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import UserId, problems
from app.api.pages.negotiation import answer, page
from app.api.request_parsing import check_ids
from app.events.ports import Holdings
from app.features.ids import user_hash, visible
from app.service import Service


@get(
    "/admin/users/{user_id:str}/erase",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="See what erasing a user would delete",
    description="Nothing is deleted by this. `DELETE /admin/users/{user_id}` erases.",
    responses=problems(400, 401, 403, 422, 503),
)
async def get_erasure(request: HttpRequest, user_id: UserId) -> Response[UserHoldings]:
    """What is there of one user."""
    check_ids([user_id], "user_id")
    return await answer(request, await _holdings(service_of(request), user_id), "user_erase.html", refusal=None)


@post(
    "/admin/users/{user_id:str}/erase",
    status_code=200,
    opt={"scope": "admin"},
    include_in_schema=False,  # for the form alone
)
async def erase_user_by_form(request: HttpRequest, user_id: UserId) -> Response[Any]:
    """Erase one user whose id was typed."""
    service = service_of(request)
    check_ids([user_id], "user_id")
    if (await read_form(request)).get("confirm") not in (user_id, visible(user_id)):
        refusal = "That is not the user's id, so nothing was deleted. Capitals and spaces count."
        body = await _holdings(service, user_id)
        return await answer(request, body, "user_erase.html", status_code=422, refusal=refusal)
    erased = await _erase(request, user_id)
    return await page(request, "user_erased.html", user_id=user_id, erased=erased, hashed=user_hash(user_id))


@delete(
    "/admin/users/{user_id:str}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Erase a user",
    description="Deletes the user's events, decisions, learned state, dead letters and cached values for good, and "
    "their events in jobs that wait in the queue. The audit trail keeps a hash of the id.",
    responses=problems(400, 401, 403, 422, 503, 507),
)
async def erase_user(request: HttpRequest, user_id: UserId) -> None:
    """Erase one user."""
    check_ids([user_id], "user_id")
    await _erase(request, user_id)


async def _holdings(service: Service, user_id: str) -> UserHoldings:
    values = await service.inspector.live_values(user_id)
    cached = sum(value is not None for value in values) if values is not None else None
    return UserHoldings(user_id, *await service.users.holdings(user_id), cached)


async def _erase(request: HttpRequest, user_id: str) -> Holdings:
    """Everything goes; the audit keeps a hash of the id, and how much it was."""
    async with audited(request, "erase", user_hash(user_id)) as act:
        erased = await service_of(request).erasure.erase(user_id)
        act.outcome = f"done, {erased.events} events"
    return erased
