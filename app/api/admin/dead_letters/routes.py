"""Dead letters: list, replay, discard."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import Response, delete, get, post
from litestar.params import FromPath, QueryParameter

from app.api.admin.auditing import audited
from app.api.admin.dead_letters.views import discard, found, replay, shown, user_of
from app.api.admin.reasons import REASON_SCHEMA, Reason
from app.api.admin.schemas import Letter, LetterFailure, LetterList, Replayed, ReplayedAll
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.openapi.parameters import MAX_ROWID, rowid
from app.api.pages.negotiation import answer, prefers_page, redirect
from app.errors import InvalidInput, Issue, NotFound, Undecodable
from app.events.replay import MOST, REFUSALS, reason_of
from app.operations.audit import reason_problem

LETTERS_PER_PAGE = 100
LETTERS_ON_A_PAGE = 20
HOME = "/admin/dead-letters"
After = Annotated[int, QueryParameter(ge=0, le=MAX_ROWID, description="Only letters with a higher id.")]


@get(
    HOME,
    opt={"scope": "admin", "schemas": {"after": rowid(0)}},
    tags=["Admin"],
    summary="List dead letters",
    description="By id, so the oldest come first. A page for a browser.",
    responses=problems(400, 401, 403, 503),
)
async def get_letters(request: HttpRequest, after: After = 0) -> Response[LetterList]:
    """A page of them."""
    service = service_of(request)
    as_page = prefers_page(request)
    limit = LETTERS_ON_A_PAGE if as_page else LETTERS_PER_PAGE
    letters = await service.dead_letters.list(after, limit)
    more = letters[-1].id if len(letters) == limit else None
    body = LetterList([shown(item) for item in letters], more)
    if not as_page:
        return await answer(request, body, "dead_letters.html")
    users = {item.id: user_of(item) for item in letters}
    count = await service.dead_letters.count()
    return await answer(request, body, "dead_letters.html", users=users, count=count, after=after, most=MOST)


@get(
    "/admin/dead-letters/{letter_id:int}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Look at a dead letter",
    description="A page for a browser.",
    responses=problems(400, 401, 403, 404, 503),
)
async def get_letter(request: HttpRequest, letter_id: FromPath[int]) -> Response[Letter]:
    """One."""
    letter = await found(service_of(request), letter_id)
    return await answer(request, shown(letter), "dead_letter.html", user=user_of(letter))


@post(
    "/admin/dead-letters/replay",
    status_code=200,
    opt={"scope": "admin", "schemas": {"after": rowid(0)}},
    tags=["Admin"],
    summary="Replay dead letters",
    description=f"All above `after`, up to {MOST:,} at a time; go on with `next_after`. A letter that is still no "
    "event stays where it is, and `failures` says why.",
    responses=problems(400, 401, 403, 503, 507),
)
async def replay_letters(request: HttpRequest, after: After = 0) -> Response[ReplayedAll]:
    """Try all again."""
    async with audited(request, "replay all", "dead-letters") as act:
        tally = await service_of(request).replayer.replay_all(after)
        act.outcome = f"done: {tally.replayed} replayed, {len(tally.failures)} still fail"
    failures = [LetterFailure(letter_id, reason) for letter_id, reason in tally.failures.items()]
    body = ReplayedAll(
        tally.replayed, tally.accepted, tally.duplicates, tally.revived, len(failures), failures, tally.next_after
    )
    return await answer(request, body, "replayed.html")


@post(
    "/admin/dead-letters/{letter_id:int}/replay",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Replay a dead letter",
    description="Takes the payload in as an event, or gives a stored event to the workers again. "
    "A payload that is still no event stays where it is, and the answer says why.",
    responses=problems(400, 401, 403, 404, 409, 422, 503, 507),
)
async def replay_letter(request: HttpRequest, letter_id: FromPath[int]) -> Response[Replayed]:
    """Try one again."""
    if not is_form(request):
        return Response(await replay(request, letter_id))
    try:
        done = await replay(request, letter_id)
    except REFUSALS as error:
        said = f"Letter {letter_id} stays: {reason_of(error)}."
        return await redirect(request, f"{HOME}/{letter_id}", said)
    except NotFound:
        return await _gone(request, letter_id)
    if done.revived:
        what = "its event is with the workers again"
    else:
        what = "its event is taken in" if done.accepted else "its event was stored already"
    return await redirect(request, HOME, f"Letter {letter_id} is replayed: {what}.")


@delete(
    "/admin/dead-letters/{letter_id:int}",
    opt={"scope": "admin", "schemas": {"reason": REASON_SCHEMA}},
    tags=["Admin"],
    summary="Discard a dead letter",
    description="The audit trail keeps the reason, and not the payload.",
    responses=problems(400, 401, 403, 404, 503, 507),
)
async def discard_letter(request: HttpRequest, letter_id: FromPath[int], reason: Reason = "") -> None:
    """Forget one."""
    if (wrong := reason_problem(reason)) is not None:
        raise Undecodable("the reason is not allowed", [Issue("reason", wrong)])
    await discard(request, letter_id, reason)


@post("/admin/dead-letters/{letter_id:int}/discard", status_code=200, opt={"scope": "admin"}, include_in_schema=False)
async def discard_from_page(request: HttpRequest, letter_id: FromPath[int]) -> Response[Any]:
    """Forget one, for a reason, and go back to the list."""
    reason = (await read_form(request)).require("reason", "the reason")
    if (wrong := reason_problem(reason)) is not None:
        raise InvalidInput("the reason is not allowed", [Issue("reason", wrong)])
    try:
        await discard(request, letter_id, reason)
    except NotFound:
        return await _gone(request, letter_id)
    return await redirect(request, HOME, f"Letter {letter_id} is discarded.")


async def _gone(request: HttpRequest, letter_id: int) -> Response[Any]:
    return await redirect(request, HOME, f"There is no letter {letter_id} any more: it was replayed or discarded.")
