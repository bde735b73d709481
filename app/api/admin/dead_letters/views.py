"""One dead letter as admins see it, and discarding one: its payload may be about a user, the audit trail never is."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from app.api.admin.auditing import audited
from app.api.admin.schemas import Letter, Replayed
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.parameters import MAX_ROWID
from app.errors import Conflict, NotFound
from app.events.ports import DeadLetter
from app.events.replay import REFUSALS
from app.features.clock import rfc3339
from app.features.ids import id_problem, user_hash
from app.service import Service


async def found(service: Service, letter_id: int) -> DeadLetter:
    """One letter; raises `NotFound`."""
    letter = await service.dead_letters.get(letter_id) if 0 <= letter_id <= MAX_ROWID else None
    if letter is None:
        raise NotFound(f"there is no dead letter {letter_id}")
    return letter


async def replay(request: HttpRequest, letter_id: int) -> Replayed:
    """Try one again; raises `NotFound`, or what `Replayer.replay` raises."""
    service = service_of(request)
    letter = await found(service, letter_id)
    async with audited(request, "replay", _subject(letter_id)) as act:
        try:
            return Replayed(*await service.replayer.replay(letter))
        except REFUSALS as error:
            # What is wrong in detail may quote the payload.
            clash = isinstance(error, Conflict)
            act.outcome = f"refused: {'its event id is known with other content' if clash else 'it is still no event'}"
            raise


async def discard(request: HttpRequest, letter_id: int, reason: str) -> None:
    """Forget a letter, for a reason that is allowed (or none); raises `NotFound`."""
    service = service_of(request)
    letter = await found(service, letter_id)
    async with audited(request, "discard", _subject(letter_id)) as act:
        if not await service.dead_letters.discard(letter_id):
            raise NotFound(f"there is no dead letter {letter_id}")
        act.outcome = f"done: {_without_users(reason.strip(), letter)}" if reason.strip() else "done"


def user_of(letter: DeadLetter) -> str | None:
    """The user that a letter's payload names, where that could be one."""
    payload = _decoded(letter)
    user_id = payload.get("user_id") if isinstance(payload, dict) else None
    return user_id if isinstance(user_id, str) and id_problem(user_id) is None else None


def _decoded(letter: DeadLetter) -> Any:
    try:
        return msgspec.json.decode(letter.payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def shown(item: DeadLetter) -> Letter:
    """As it is answered."""
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


def _without_users(reason: str, letter: DeadLetter) -> str:
    """The reason with hashes where it names users of the payload, under whatever spelling of the field."""
    named = [name for name in _users_in(_decoded(letter)) if name in reason]
    if not named:
        return reason
    # The longest first: one id may begin another. Only ASCII letters go on: not every script puts spaces between words.
    either = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{either})(?!\w)", lambda found: user_hash(found[0]), reason, flags=re.ASCII)


def _users_in(payload: Any) -> set[str]:
    """Whatever stands in a field that is called after users; a payload that is no event may be of any shape."""
    found: set[str] = set()
    waiting = [(payload, False)]
    while waiting:
        item, of_users = waiting.pop()
        if isinstance(item, dict):
            waiting.extend((value, "user" in name.lower()) for name, value in item.items())
        elif isinstance(item, list):
            waiting.extend((value, of_users) for value in item)
        elif of_users and item not in ("", None):
            found.add(str(item))
    return found


def _subject(letter_id: int) -> str:
    return f"dead-letter:{letter_id}"
