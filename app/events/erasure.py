"""Erases a user from the queue, the database and the cache.

Payloads in the queue or in dead letters that never became events are erased, too, if they name the user. A payload with
fields `user_id`, `userId`, `user` or `uid` at any depth names the users in them. A payload without such a field (text,
a pickle) names every user whose id occurs in it as a word: it is better to erase too much than too little.
"""

import re
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import msgspec

from app.errors import CacheUnavailable, QueueUnavailable
from app.events.ports import Holdings, UserRecords
from app.features.clock import Clock
from app.telemetry import logger

_OWNER = frozenset({"userid", "user", "uid"})
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")  # an undecodable byte, as `backslashreplace` writes it
log = logger("events.erasure")


class Erasure(msgspec.Struct, frozen=True, kw_only=True):
    """Erases users. `erase_jobs` removes a user's events from queue jobs, and returns once no worker is storing such an
    event; None if there is no queue. `settle` deletes the cache keys whose deletion is owed. `drop_cached` deletes the
    user's keys under every epoch."""

    users: UserRecords
    erase_jobs: Callable[[str], Awaitable[object]] | None
    settle: Callable[[], Awaitable[object]]
    drop_cached: Callable[[str], Awaitable[None]]
    clock: Clock

    async def erase(self, user_id: str) -> Holdings:
        """Erase a user; return how much the database held of the user. Raises `QueueUnavailable` if only queue jobs may
        still name the user, and `StoreUnavailable` if other data may be left. Repeat the call after either error."""
        # The queue comes first: the events of a job that a worker runs are stored before the rows are deleted.
        unavailable: QueueUnavailable | None = None
        try:
            if self.erase_jobs is not None:
                await self.erase_jobs(user_id)
        except QueueUnavailable as error:
            log.warning("jobs_not_erased", error=str(error))
            unavailable = error
        erased = await self.users.erase(user_id, self.clock.now_ms())
        await self.settle()
        await self.users.erase_decisions(user_id)
        try:
            await self.drop_cached(user_id)
        except CacheUnavailable as error:  # no process reads the keys of earlier epochs, and they expire
            log.warning("earlier_values_not_erased", error=str(error))
        if unavailable is not None:
            reason = unavailable.public_reason
            raise QueueUnavailable(f"the user is erased except for jobs in the queue: {reason}; erase again later")
        return erased


def names(value: object, user_id: str) -> bool:
    """Whether a payload, decoded from JSON or msgpack, names this user or may do so."""
    found = [(key.replace("_", "").replace("-", "").lower(), part) for key, part in parts(value)]
    owners = {str(part) for key, part in found if key in _OWNER and isinstance(part, str | int)}
    if owners:
        return user_id in owners
    texts = [part for _, part in found if isinstance(part, str)]
    return any(_is_word_of(user_id, text) or _is_word_of(user_id, _unpacked(text)) for text in texts)


def parts(value: object) -> Iterator[tuple[str, object]]:
    """Yield every scalar of a nested value as (its key in a dict or "", scalar), and every dict key as ("", key)."""
    waiting = [("", value)]  # not recursive, because the sender of a payload chooses its depth
    while waiting:
        key, part = waiting.pop()
        if isinstance(part, dict):
            waiting += [("", name) for name in part] + [(str(name), item) for name, item in part.items()]
        elif isinstance(part, list | tuple):
            waiting += [(key, item) for item in part]
        else:
            yield key, part.decode("utf-8", "backslashreplace") if isinstance(part, bytes) else part


def _unpacked(text: str) -> str:
    """Decode base64, in which dead letters hold bytes, to text; empty if `text` is not base64."""
    with suppress(ValueError):
        return b64decode(text, validate=True).decode("utf-8", "backslashreplace")
    return ""


def _is_word_of(user_id: str, text: str) -> bool:
    """Whether an id is a word of a text, or stands after a control character or a length byte, as in msgpack and
    pickles. The regular expression begins with the id, because `re` finds a fixed prefix fast in a large text."""
    word, length = re.escape(user_id), re.escape(chr(len(user_id.encode())))
    pattern = rf"{word}(?:(?<=[\0-\x1f{length}]{word})|(?![\w-])(?<![\w-]{word}))"
    return re.search(pattern, _ESCAPED.sub("\0", text)) is not None
