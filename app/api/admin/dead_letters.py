"""Dead letters: list, replay, discard."""

from __future__ import annotations

from typing import Annotated, Any

from litestar import delete, get, post
from litestar.params import FromPath, QueryParameter

from app.api.admin.actors import caller
from app.api.admin.schemas import Letter, LetterList, Replayed
from app.api.context import Api, HttpRequest, api_of
from app.api.documents import problems
from app.errors import NotFound
from app.events.admission import decode_json
from app.events.ports import DeadLetter
from app.features.clock import rfc3339

LETTERS_PER_PAGE = 100
MAX_ROWID = 2**63 - 1


@get(
    "/admin/dead-letters",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="List dead letters",
    responses=problems(400, 401, 403, 503),
)
async def get_letters(
    request: HttpRequest,
    after: Annotated[int, QueryParameter(ge=0, le=MAX_ROWID, description="Only letters with a higher id.")] = 0,
) -> LetterList:
    """A page of them."""
    letters = await api_of(request).letters.list(after, LETTERS_PER_PAGE)
    more = letters[-1].id if len(letters) == LETTERS_PER_PAGE else None
    return LetterList([_letter(item) for item in letters], more)


@post(
    "/admin/dead-letters/{letter_id:int}/replay",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Replay a dead letter",
    description="Takes the payload in as an event, or gives a stored event to the workers again. "
    "A payload that is still no event stays where it is, and the answer says why.",
    responses=problems(400, 401, 403, 404, 409, 422, 503),
)
async def replay_letter(request: HttpRequest, letter_id: FromPath[int]) -> Replayed:
    """Try one again."""
    api = api_of(request)
    letter = await _found(api, letter_id)
    if letter.seq is not None:
        await api.letters.revive(letter_id)
        outcome = Replayed(0, 0, True)
    else:
        receipt = await api.ingestor.ingest(decode_json(letter.payload.encode()))
        await api.letters.discard(letter_id)
        outcome = Replayed(receipt.accepted, receipt.duplicates, False)
    await api.audit(caller(request).name, "replay", f"dead-letter:{letter_id}", "done")
    return outcome


@delete(
    "/admin/dead-letters/{letter_id:int}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Discard a dead letter",
    responses=problems(400, 401, 403, 404, 503),
)
async def discard_letter(request: HttpRequest, letter_id: FromPath[int]) -> None:
    """Forget one."""
    api = api_of(request)
    if letter_id > MAX_ROWID or not await api.letters.discard(letter_id):
        raise NotFound(f"there is no dead letter {letter_id}")
    await api.audit(caller(request).name, "discard", f"dead-letter:{letter_id}", "done")


async def _found(api: Api, letter_id: int) -> DeadLetter:
    letter = await api.letters.get(letter_id) if letter_id <= MAX_ROWID else None
    if letter is None:
        raise NotFound(f"there is no dead letter {letter_id}")
    return letter


def _letter(item: DeadLetter) -> Letter:
    source: Any = item.source
    return Letter(
        item.id,
        source,
        item.payload,
        item.error,
        item.traceback,
        item.attempts,
        item.seq,
        rfc3339(item.created_at_ms),
        rfc3339(item.last_failed_at_ms),
    )
