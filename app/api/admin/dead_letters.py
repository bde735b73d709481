"""Dead letters: list, replay, discard."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from litestar import delete, get, post
from litestar.params import FromPath, QueryParameter

from app.api.admin.actors import audited, user_hash
from app.api.admin.schemas import Letter, LetterFailure, LetterList, Replayed, ReplayedAll
from app.api.context import Api, HttpRequest, api_of
from app.api.documents import problems
from app.errors import Conflict, Issue, NotFound, Undecodable
from app.events.ports import DeadLetter
from app.events.replay import REFUSALS
from app.features.clock import rfc3339

LETTERS_PER_PAGE = 100
MAX_ROWID = 2**63 - 1
MAX_REASON = 400
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
Reason = Annotated[
    str, QueryParameter(description=f"Why, for the audit trail; up to {MAX_REASON} characters, no user's id.")
]
After = Annotated[int, QueryParameter(ge=0, le=MAX_ROWID, description="Only letters with a higher id.")]


@get(
    "/admin/dead-letters",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="List dead letters",
    responses=problems(400, 401, 403, 503),
)
async def get_letters(request: HttpRequest, after: After = 0) -> LetterList:
    """A page of them."""
    letters = await api_of(request).letters.list(after, LETTERS_PER_PAGE)
    more = letters[-1].id if len(letters) == LETTERS_PER_PAGE else None
    return LetterList([_letter(item) for item in letters], more)


@get(
    "/admin/dead-letters/{letter_id:int}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Look at a dead letter",
    responses=problems(400, 401, 403, 404, 503),
)
async def get_letter(request: HttpRequest, letter_id: FromPath[int]) -> Letter:
    """One."""
    return _letter(await found(api_of(request), letter_id))


@post(
    "/admin/dead-letters/replay",
    status_code=200,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Replay dead letters",
    description="All above `after`, up to 1,000 at a time; go on with `next_after`. A letter that is still no event "
    "stays where it is, and `failures` says why.",
    responses=problems(400, 401, 403, 503),
)
async def replay_letters(request: HttpRequest, after: After = 0) -> ReplayedAll:
    """Try all again."""
    async with audited(request, "replay all", "dead-letters") as act:
        tally = await api_of(request).replayer.replay_all(after)
        act.outcome = f"done: {tally.replayed} replayed, {len(tally.failures)} still fail"
    failures = [LetterFailure(letter_id, reason) for letter_id, reason in tally.failures.items()]
    return ReplayedAll(
        tally.replayed, tally.accepted, tally.duplicates, tally.revived, len(failures), failures, tally.next_after
    )


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
    letter = await found(api, letter_id)
    async with audited(request, "replay", subject_of(letter_id)) as act:
        try:
            return Replayed(*await api.replayer.replay(letter))
        except REFUSALS as error:
            # What is wrong in detail may quote the payload, which is about a user.
            known = isinstance(error, Conflict)
            act.outcome = f"refused: {'its event id has other content' if known else 'it is still no event'}"
            raise


@delete(
    "/admin/dead-letters/{letter_id:int}",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Discard a dead letter",
    description="The audit trail keeps the reason, and not the payload.",
    responses=problems(400, 401, 403, 404, 503),
)
async def discard_letter(request: HttpRequest, letter_id: FromPath[int], reason: Reason = "") -> None:
    """Forget one."""
    if (wrong := reason_problem(reason)) is not None:
        raise Undecodable("the reason is not allowed", [Issue("reason", wrong)])
    await discard(request, letter_id, reason)


async def discard(request: HttpRequest, letter_id: int, reason: str) -> None:
    """Forget a letter; raises `NotFound`."""
    api = api_of(request)
    letter = await found(api, letter_id)
    async with audited(request, "discard", subject_of(letter_id)) as act:
        if not await api.letters.discard(letter_id):
            raise NotFound(f"there is no dead letter {letter_id}")
        act.outcome = f"done: {without_user(reason.strip(), letter)}" if reason.strip() else "done"


def reason_problem(reason: str) -> str | None:
    """Why a reason is not allowed, or None where it is."""
    if len(reason) > MAX_REASON:
        return f"must be at most {MAX_REASON} characters, has {len(reason)}"
    return "must not contain control characters" if _CONTROL.search(reason) else None


def without_user(reason: str, letter: DeadLetter) -> str:
    """A reason with the hash of the letter's user where it names the user."""
    try:
        payload = msgspec.json.decode(letter.payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return reason
    user_id = payload.get("user_id") if isinstance(payload, dict) else None
    if not isinstance(user_id, str) or not user_id:
        return reason
    return re.sub(rf"(?<!\w){re.escape(user_id)}(?!\w)", user_hash(user_id), reason)


def subject_of(letter_id: int) -> str:
    """A letter in the audit trail."""
    return f"dead-letter:{letter_id}"


async def found(api: Api, letter_id: int) -> DeadLetter:
    """One letter; raises `NotFound`."""
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
