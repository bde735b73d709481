"""Jobs of many events, read from the queue in pieces.

arq fetches and decodes a whole job at once: a million events took 800 MB. A `tip_events` job of more than `PIECE_BYTES`
is therefore set aside: before arq fetches the job, its bytes move to another key, and a small job takes its place. The
small job holds a position in the bytes, and is retried until no events are left. Invariant: the position moves only
after all events before it are stored or dead letters. So if a worker is killed, at most one piece is ingested again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import msgspec
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from redis.exceptions import WatchError

from app.errors import InvalidInput, QueueUnavailable
from app.events.naming import names
from app.stores.queue.client import LARGE_TIP_EVENTS, PICKLED, TIP_EVENTS, burial, is_pickle, serialize
from app.stores.valkey.pool import AWAY, public_reason

PIECE_BYTES = 256 * 1024
PIECE_EVENTS = 1_000
MAX_JOB_BYTES = 256 * 1024 * 1024
_HEAD_BYTES = 4_096
_SHOWN_BYTES = 1_000

# msgpack, by the first byte of a value: https://github.com/msgpack/msgpack/blob/master/spec.md
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}  # nil, false, true, numbers
_FIXED |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
# Width of the length in bytes, and further bytes: binaries, extensions, strings.
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1)}
_SIZED |= {0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # width of the count, values per item: arrays, maps
_ARRAY, _MAP = 0x90, 0x80


class Position(NamedTuple):
    """The progress of a job that is read in pieces, stored as the arguments of its small job. `at`: byte offset of the
    next event. `taken`: the number of events read so far. `events`: the number of events in the whole job."""

    at: int
    taken: int
    events: int


async def set_aside(redis: ArqRedis, job_id: str) -> None:
    """If a job has more than `PIECE_BYTES`, move its bytes to another key and put a small job in its place.

    If such a job has more than `MAX_JOB_BYTES`, or no list of events, replace it by a job that stores a dead letter.
    Raises `QueueUnavailable`.
    """
    key = job_key_prefix + job_id
    with _asking():
        if await redis.strlen(key) <= PIECE_BYTES:
            return
        async with redis.pipeline(transaction=True) as pipe:
            await pipe.watch(key)
            size, ttl_ms = await pipe.strlen(key), await pipe.pttl(key)
            if size <= PIECE_BYTES:
                return
            head = await pipe.getrange(key, 0, _HEAD_BYTES - 1)
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py has no types
            try:
                if size > MAX_JOB_BYTES:
                    raise InvalidInput(f"the job has {size:,} bytes, more than {MAX_JOB_BYTES:,}; send several jobs")
                job = {"t": 1, "f": LARGE_TIP_EVENTS, "a": list(_first(head)), "k": {}, "et": 0}
                pipe.rename(key, _aside(job_id))
            except InvalidInput as error:
                shown = head[:_SHOWN_BYTES].decode("utf-8", "backslashreplace")
                job = burial(f"{shown}… ({size:,} bytes)", str(error))
            pipe.set(key, serialize(job), px=ttl_ms if ttl_ms > 0 else None)
            with suppress(WatchError):  # the job has expired, or another worker has replaced it
                await pipe.execute()


class LargeJob:
    """A job whose bytes `set_aside` has moved to another key. Every method raises `QueueUnavailable`."""

    def __init__(self, redis: ArqRedis, job_id: str) -> None:
        self._redis = redis
        self._job_id = job_id

    async def read(self, position: Position) -> tuple[list[object], Position]:
        """Read the next events, up to `PIECE_EVENTS` or `PIECE_BYTES`. Return them and the position after them.

        Erased events are left out.

        Raises:
            InvalidInput: the next event is missing or too large, so the rest cannot be read.
        """
        with _asking():
            data = await self._redis.getrange(_aside(self._job_id), position.at, position.at + PIECE_BYTES - 1)
        values, end = split(data, min(PIECE_EVENTS, position.events - position.taken))
        if not values:
            fault = f"is larger than {PIECE_BYTES:,} bytes" if len(data) == PIECE_BYTES else "is missing"
            raise InvalidInput(f"the event [{position.taken}] of {position.events} {fault}; the rest cannot be read")
        events = [value for value in values if not _is_blank(value)]
        return events, Position(position.at + end, position.taken + len(values), position.events)

    async def move(self, position: Position) -> None:
        """Store `position` in the small job, so that its next try continues there."""
        job = {"t": 1, "f": LARGE_TIP_EVENTS, "a": list(position), "k": {}, "et": 0}
        with _asking():
            await self._redis.set(job_key_prefix + self._job_id, serialize(job), xx=True, keepttl=True)

    async def erase(self, user_id: str, position: Position) -> bool:
        """Overwrite a user's events from `position` on with zeros of the same length. Return whether there were any."""
        key, found = _aside(self._job_id), False
        while position.taken < position.events:
            with _asking():
                async with self._redis.pipeline(transaction=True) as pipe:
                    # Without WATCH: 1. this reads; 2. a worker deletes the key; 3. this writes, and the key stays.
                    await pipe.watch(key)
                    data = await pipe.getrange(key, position.at, position.at + PIECE_BYTES - 1)
                    spans = list(_spans(data, min(PIECE_EVENTS, position.events - position.taken)))
                    if not spans:
                        break
                    pipe.multi()  # type: ignore[no-untyped-call]
                    for begin, end in spans:
                        item = data[begin:end]
                        if user_id.encode() in item and names(_decoded(item), user_id):
                            pipe.setrange(key, position.at + begin, _blank(end - begin))
                            found = True
                    try:
                        await pipe.execute()
                    except WatchError:
                        continue
            position = Position(position.at + spans[-1][1], position.taken + len(spans), position.events)
        return found

    async def forget(self) -> None:
        """Delete the key to which the bytes were moved."""
        with _asking():
            await self._redis.delete(_aside(self._job_id))


def split(data: bytes, most: int) -> tuple[list[object], int]:
    """Up to `most` complete values at the start of concatenated msgpack, and the offset at which the last one ends."""
    spans = list(_spans(data, most))
    return [_decoded(data[begin:end]) for begin, end in spans], spans[-1][1] if spans else 0


def position_of(job: dict[str, Any]) -> Position | None:
    """The position that a small job of `set_aside` holds; None for any other job."""
    return Position(*job["a"]) if job["f"] == LARGE_TIP_EVENTS else None


def _spans(data: bytes, most: int) -> Iterator[tuple[int, int]]:
    begin = 0
    with suppress(IndexError):
        for _ in range(most):
            if (end := _end(data, begin)) > len(data):
                return
            yield begin, end
            begin = end


def _blank(size: int) -> bytes:
    """A msgpack binary of zeros that is `size` bytes long, header included. `size` is at least 2."""
    code, width = (0xC4, 1) if size < 258 else (0xC5, 2) if size < 65_539 else (0xC6, 4)
    length = size - 1 - width
    return bytes([code]) + length.to_bytes(width) + bytes(length)


def _is_blank(value: object) -> bool:
    return isinstance(value, bytes) and not any(value)


def _aside(job_id: str) -> str:
    return f"arq:large:{job_id}"


@contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except AWAY as error:
        raise QueueUnavailable(f"{type(error).__name__}: {error}", public_reason(error)) from error


def _first(head: bytes) -> Position:
    """The position of the first event of a `tip_events` job. `head` is the beginning of the job's bytes. Raises
    `InvalidInput` for any other job."""
    name: object = None
    try:
        at, fields = _header(head, 0, _MAP)
        for _ in range(fields):
            end = _end(head, at)
            field, at = _decoded(head[at:end]), end
            if field == "a" and name == TIP_EVENTS:
                at, arguments = _header(head, at, _ARRAY)
                at, events = _header(head, at, _ARRAY)
                if arguments == 1:
                    return Position(at, 0, events)
                break
            end = _end(head, at)
            if field == "f":
                name = _decoded(head[at:end])
            at = end
    except IndexError:
        pass
    if is_pickle(head):
        raise InvalidInput(PICKLED)
    wanted = f"{TIP_EVENTS} with one argument, a list of events, as arq writes it"
    raise InvalidInput(f"a job of more than {PIECE_BYTES:,} bytes must be {wanted}")


def _header(data: bytes, at: int, kind: int) -> tuple[int, int]:
    """Decode the header of a msgpack map or array. Return the offset of its first item and the number of items. `kind`
    is `_MAP` or `_ARRAY`. Raises `IndexError` if the value at `at` is of another kind or incomplete."""
    code = data[at]
    if code & 0xF0 == kind:
        return at + 1, code & 0x0F
    width, values = _COUNTED.get(code, (0, 0))
    if values != (1 if kind == _ARRAY else 2):
        raise IndexError
    return at + 1 + width, int.from_bytes(data[at + 1 : at + 1 + width])


def _end(data: bytes, at: int) -> int:
    """The offset at which the msgpack value that begins at `at` ends. If the value is incomplete, the offset is beyond
    the end of `data`, or `IndexError` is raised."""
    left = 1
    while left:
        code = data[at]
        left -= 1
        at += 1
        if code <= 0x7F or code >= 0xE0:
            continue
        if code <= 0x8F:
            left += 2 * (code & 0x0F)
        elif code <= 0x9F:
            left += code & 0x0F
        elif code <= 0xBF:
            at += code & 0x1F
        elif code in _FIXED:
            at += _FIXED[code]
        elif code in _SIZED:
            width, more = _SIZED[code]
            at += width + more + int.from_bytes(data[at : at + width])
        else:
            width, values = _COUNTED.get(code, (0, 0))  # 0xC1 is invalid; decoding rejects it
            left += values * int.from_bytes(data[at : at + width])
            at += width
    return at


def _decoded(item: bytes) -> object:
    try:
        return msgspec.msgpack.decode(item)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, TypeError):
        return item.decode("utf-8", "backslashreplace")  # not an event: it becomes a dead letter
