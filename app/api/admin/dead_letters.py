"""Routes to list, replay and discard dead letters. In the audit trail, hashes replace the user ids of a payload."""

import re
from typing import Annotated, Any, Literal

import msgspec
from litestar import Response
from litestar.params import FromPath, QueryParameter
from msgspec import Meta

from app.api.admin import Reason, admin_delete, admin_get, admin_post, audited, checked_reason, form_post
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest
from app.api.openapi import MAX_ROWID, ROWID
from app.api.pages.negotiation import answer, prefers_page, redirect
from app.errors import Conflict, InvalidInput, Issue, NotFound, Undecodable
from app.events.erasure import parts
from app.events.ports import DeadLetter
from app.events.queue_door import MOST, REFUSALS, ReplayedLetter, ReplayedLetters, reason_of
from app.events.strict_json import UNDECODABLE
from app.features.ids import id_problem, user_hash
from app.features.views import view
from app.service import Service

LETTERS_PER_ANSWER, LETTERS_PER_PAGE = 100, 20
HOME = "/admin/dead-letters"
GONE = "is gone: it was replayed or discarded meanwhile"
After = Annotated[int, QueryParameter(ge=0, le=MAX_ROWID, description="Only those above this id.", schema_extra=ROWID)]


class DeadLetterView(msgspec.Struct):
    """A dead letter: an event whose consumption failed repeatedly, or a queued payload that was rejected."""

    id: int
    source: Annotated[
        Literal["queue", "consumption"],
        Meta(description="`queue`: it was no valid event. `consumption`: an event that failed repeatedly."),
    ]
    payload: str
    error: str
    traceback: str
    attempts: int
    event_seq: int | None
    created_at: str
    last_failed_at: str


class DeadLetterList(msgspec.Struct):
    """A page of dead letters, lowest id first. Continue with `after=next_after`, which is null on the last page."""

    dead_letters: list[DeadLetterView]
    next_after: int | None


@admin_get(HOME, summary="List dead letters", description="By id, the oldest first. A page for a browser.")
async def get_letters(request: HttpRequest, after: After = 0) -> Response[DeadLetterList]:
    letters, as_page = request.service.dead_letters, prefers_page(request)
    limit = LETTERS_PER_PAGE if as_page else LETTERS_PER_ANSWER
    found = await letters.list(after, limit + 1)
    shown, more = found[:limit], found[limit - 1].id if len(found) > limit else None
    body = DeadLetterList([view(DeadLetterView, item, event_seq=item.seq) for item in shown], more)
    users = {item.id: _user_of(item) for item in shown} if as_page else {}
    count = await letters.count() if as_page else 0
    return await answer(request, body, "dead_letters.html", users=users, count=count, after=after, most=MOST)


@admin_get(f"{HOME}/{{letter_id:int}}", summary="Look at a dead letter", description="A page for a browser.")
async def get_letter(request: HttpRequest, letter_id: FromPath[int]) -> Response[DeadLetterView]:
    letter = await _letter(request.service, letter_id)
    body = view(DeadLetterView, letter, event_seq=letter.seq)
    return await answer(request, body, "dead_letter.html", user=_user_of(letter))


@admin_post(
    f"{HOME}/replay",
    summary="Replay dead letters",
    description=f"Replays the letters with an id above `after`, up to {MOST:,} at a time; continue with `next_after`. "
    "A letter that is still no valid event is kept, and `failures` says why.",
)
async def replay_letters(request: HttpRequest, after: After = 0) -> Response[ReplayedLetters]:
    async with audited(request, "replay all", "dead-letters") as act:
        tally = await request.service.queue_door.replay_all(after)
        act.outcome = f"done: {tally.replayed} replayed, {tally.failed} still fail"
    return await answer(request, tally, "replayed.html")


@admin_post(
    f"{HOME}/{{letter_id:int}}/replay",
    summary="Replay a dead letter",
    description="Ingests the payload as an event, or gives a stored event to the workers again. A payload that is "
    "still no valid event is kept, and the answer says why.",
    problems={
        409: "The payload is still refused: its event id is stored with other content.",
        422: "The payload is still no valid event.",
    },
)
async def replay_letter(request: HttpRequest, letter_id: FromPath[int]) -> Response[ReplayedLetter]:
    if not is_form(request):
        return Response(await _replay(request, letter_id))
    path = HOME
    try:
        done = await _replay(request, letter_id)
        said = "was replayed: its event was " + ("ingested" if done.accepted else "stored already")
        if done.revived:
            said = "was replayed: a worker will consume its event again"
    except REFUSALS as error:
        path, said = f"{HOME}/{letter_id}", f"was not replayed: {reason_of(error)}"
    except NotFound:
        said = GONE
    return await redirect(request, path, f"Letter {letter_id} {said}.")


@admin_delete(
    f"{HOME}/{{letter_id:int}}",
    summary="Discard a dead letter",
    description="The audit trail keeps the reason, and not the payload.",
)
async def discard_letter(request: HttpRequest, letter_id: FromPath[int], reason: Reason = "") -> None:
    await _discard(request, letter_id, checked_reason(reason, Undecodable))


@form_post(f"{HOME}/{{letter_id:int}}/discard")
async def discard_from_page(request: HttpRequest, letter_id: FromPath[int]) -> Response[Any]:
    reason = checked_reason((await read_form(request)).get("reason", ""))
    if not reason.strip():
        raise InvalidInput("the reason is missing", [Issue("reason", "must not be empty")])
    said = "was discarded"
    try:
        await _discard(request, letter_id, reason)
    except NotFound:
        said = GONE
    return await redirect(request, HOME, f"Letter {letter_id} {said}.")


async def _letter(service: Service, letter_id: int) -> DeadLetter:
    letter = await service.dead_letters.get(letter_id) if 0 <= letter_id <= MAX_ROWID else None
    if letter is None:
        raise NotFound(f"there is no dead letter {letter_id}")
    return letter


async def _replay(request: HttpRequest, letter_id: int) -> ReplayedLetter:
    """Replay a dead letter. Raises `NotFound` if it does not exist, or one of `REFUSALS` if it is rejected again."""
    letter = await _letter(request.service, letter_id)
    async with audited(request, "replay", f"dead-letter:{letter_id}") as act:
        try:
            return await request.service.queue_door.replay(letter)
        except REFUSALS as error:
            # The message of the error may quote the payload, which may name a user.
            clash = isinstance(error, Conflict)
            act.outcome = f"refused: {'its event id is known with other content' if clash else 'still no valid event'}"
            raise


async def _discard(request: HttpRequest, letter_id: int, reason: str) -> None:
    letter = await _letter(request.service, letter_id)
    async with audited(request, "discard", f"dead-letter:{letter_id}") as act:
        if not await request.service.dead_letters.discard(letter_id):
            raise NotFound(f"there is no dead letter {letter_id}")
        act.outcome = f"done: {_without_users(reason.strip(), letter)}" if reason.strip() else "done"


def _user_of(letter: DeadLetter) -> str | None:
    payload = _decoded(letter)
    user_id = payload.get("user_id") if isinstance(payload, dict) else None
    return user_id if isinstance(user_id, str) and id_problem(user_id) is None else None


def _decoded(letter: DeadLetter) -> Any:
    try:
        return msgspec.json.decode(letter.payload)
    except UNDECODABLE:
        return None


def _without_users(reason: str, letter: DeadLetter) -> str:
    """The reason, with possible user ids (values of fields named `…user…` in the payload) replaced by hashes."""
    fields = ((key.lower(), str(value)) for key, value in parts(_decoded(letter)) if value is not None)
    named = {value for key, value in fields if "user" in key and value and value in reason}
    if not named:
        return reason
    # The longest first, since one id may begin with another. Only an ASCII letter or digit continues an id: not every
    # script puts spaces between words.
    either = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{either})(?!\w)", lambda found: user_hash(found[0]), reason, flags=re.ASCII)
