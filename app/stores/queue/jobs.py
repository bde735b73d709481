"""The jobs of the queue: their names, their encoding as msgpack, and how a large job is split. A job that is not
msgpack or has an unknown name becomes a dead letter. A pickle is never loaded."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from redis.exceptions import WatchError

from app.errors import InvalidInput
from app.events.erasure import names

if TYPE_CHECKING:
    from arq.connections import ArqRedis

# arq's own constants. A key of the second kind exists while a worker runs the job.
JOB_PREFIX, RUNNING_PREFIX = "arq:job:", "arq:in-progress:"
CONSUME = "consume_events"
TIP_EVENTS = "tip_events"
BURY = "bury_job"
JOBS = frozenset({CONSUME, TIP_EVENTS, BURY})
# Jobs that processes of earlier releases enqueue. Nothing is to be done: periodic work does what they were for.
_is_former = re.compile(r"run_rebuild|measure_quality|prune|cron:(prune|quality)(:.*)?", re.DOTALL).fullmatch
PICKLED = "the job is a pickle, the default of arq; publish with job_serializer=msgspec.msgpack.encode"
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))  # the first bytes of a pickle
MOST_TRIES = 1_000
YEAR_3000_MS = 32_503_680_000_000
PIECE_BYTES = 256 * 1024
PIECE_EVENTS = 250  # a worker runs 20 jobs at once, and all of them must be stored within the job timeout
MAX_JOB_BYTES = 256 * 1024 * 1024
_HEAD_BYTES = 1_000
# The bytes of a `tip_events` job, as arq writes it, before its first event. They end with the number of events.
_OPENING = re.compile(
    rb"[\x82-\x85](?:\xa1t[\xc0\x00-\x7f])?\xa1f\xaatip_events\xa1a\x91(?:([\x90-\x9f])|\xdc(..)|\xdd(....))", re.DOTALL
)
# What decoding msgpack may raise. `ValueError` includes invalid UTF-8; a key of a mapping may be a mapping itself.
_UNDECODABLE = (msgspec.DecodeError, RecursionError, ValueError, TypeError)
# In msgspec's error for bytes after a value: their offset.
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)").search


def serialize(job: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode(job, enc_hook=repr)


EMPTY_JOB = serialize({"f": TIP_EVENTS, "a": [[]]})


class _Job(msgspec.Struct):
    """A job as arq encodes it. Publishers without arq may omit all fields but `f` and `a`. `f`: name of the function.
    `a`, `k`: positional and keyword arguments. `t`: current try, from 1. `et`: time of enqueueing in milliseconds."""

    f: str
    a: list[Any]
    k: dict[str, Any] = msgspec.field(default_factory=dict)
    t: int | None = None
    et: int = 0


def deserialize(raw: bytes) -> dict[str, Any]:
    """Decode a job into the mapping that arq expects. An invalid job becomes a job that stores its content as a dead
    letter. Never raises: arq drops a job that it cannot deserialize. A field of a wrong type would end the worker."""
    try:
        found = msgspec.msgpack.decode(raw)
    except _UNDECODABLE as error:
        reason = PICKLED if raw.startswith(_PICKLE) and raw.endswith(b".") else f"the job is not msgpack: {error}"
        return burial(raw.decode("utf-8", "backslashreplace"), reason)
    try:
        job = msgspec.convert(found, _Job)
    except (msgspec.ValidationError, RecursionError) as error:
        return burial(found, f"not a job: {error}")
    if _is_former(job.f):
        return deserialize(EMPTY_JOB)
    if job.f not in JOBS:
        return burial(found, f"unknown job {job.f!r}; publish events as {TIP_EVENTS}")
    if job.f == TIP_EVENTS and (len(job.a) != 1 or job.k.keys() - {"traceparent"}):
        return burial(found, f"{TIP_EVENTS} takes one argument, a list of events, and the keyword traceparent")
    tries = min(max(job.t or 1, 1), MOST_TRIES)
    enqueued_at_ms = job.et if 0 <= job.et < YEAR_3000_MS else 0
    return {"t": tries, "f": job.f, "a": job.a, "k": job.k, "et": enqueued_at_ms}


def _is_known(name: object) -> bool:
    return isinstance(name, str) and (name in JOBS or _is_former(name) is not None)


def burial(payload: object, reason: str) -> dict[str, Any]:
    """A job that stores `payload` as a dead letter with `reason` as its error."""
    return {"t": 1, "f": BURY, "a": [payload, reason], "k": {}, "et": 0}


def without_user(raw: bytes, user_id: str) -> bytes:
    """Remove a user from the bytes of a waiting job, and return the new bytes. Arguments that are lists lose the items
    that name the user; any other argument that names the user becomes an empty list. If the user is named outside the
    arguments, or in bytes that cannot be decoded, the job becomes a `tip_events` job without events."""
    if user_id.encode() not in raw:
        return raw
    try:
        found = msgspec.msgpack.decode(raw)
    except _UNDECODABLE:
        found = raw
    if not isinstance(found, dict) or not isinstance(arguments := found.get("a"), list):
        return EMPTY_JOB if names(found, user_id) else raw
    name, keywords = found.get("f"), found.get("k")
    # The names of arq's fields and of our functions may be the id of a user, too, but do not name the user.
    beside_arguments = (
        {key: value for key, value in found.items() if key not in _Job.__struct_fields__},
        list(keywords.values()) if isinstance(keywords, dict) else keywords,
        None if _is_known(name) else name,
    )
    if any(names(part, user_id) for part in beside_arguments):
        return EMPTY_JOB
    examined = len(arguments)
    if name != TIP_EVENTS and _is_known(name):
        # The service itself has made the arguments, except for the payload of a burial. They name no user, but a word
        # such as "events" may be the id of one.
        examined = 1 if name == BURY else 0
    rest = [_rest(argument, user_id) for argument in arguments[:examined]] + arguments[examined:]
    # The fields stay in their order, by which `split` recognises a large job.
    return raw if rest == arguments else serialize({**found, "a": rest})


def _rest(argument: object, user_id: str) -> object:
    if isinstance(argument, list):
        return [item for item in argument if not names(item, user_id)]
    return [] if names(argument, user_id) else argument


async def erase(redis: ArqRedis, job_id: str, user_id: str) -> bool:
    """Remove a user from a waiting job, as `without_user` does. Return whether the job has changed."""
    key = JOB_PREFIX + job_id

    async def work(pipe: Any) -> bool:
        raw = await pipe.get(key)
        pipe.multi()
        if changed := raw is not None and (rest := without_user(raw, user_id)) != raw:
            pipe.set(key, rest, keepttl=True)
        return changed

    # Without WATCH: 1. two erasures read the job; 2. one stores it; 3. the other stores it with the first user's events
    # again. Or: 2. a worker finishes the job; 3. it is stored again.
    return bool(await redis.transaction(work, key, value_from_callable=True))


async def split(redis: ArqRedis, job_id: str) -> None:
    """If a `tip_events` job has more than `PIECE_BYTES`, move its events to jobs of up to `PIECE_EVENTS` each. arq
    decodes a whole job at once: a million events took 800 MB. What cannot be split is replaced by a job that stores a
    dead letter: a large job of another kind, a job of more than `MAX_JOB_BYTES`, and the rest of a job from an
    unreadable event on. No event is in two jobs that can run: the new jobs are put on the queue only once the large one
    is empty."""
    key, queue = JOB_PREFIX + job_id, redis.default_queue_name
    at, taken, events, pieces = 0, 0, 1, dict[str, float]()
    while taken < events and await redis.strlen(key) > PIECE_BYTES:
        async with redis.pipeline(transaction=True) as pipe:
            # Without WATCH: 1. this reads a user's events; 2. an erasure splits the job and takes them out of the new
            # jobs; 3. this stores them again.
            await pipe.watch(key)
            size, ttl_ms, score = await pipe.strlen(key), await pipe.pttl(key), await pipe.zscore(queue, job_id) or 0
            if size <= PIECE_BYTES:  # another process has split it since
                return
            head = await pipe.getrange(key, 0, _HEAD_BYTES - 1)
            store = partial(pipe.set, px=ttl_ms if ttl_ms > 0 else None)
            try:
                if not taken:
                    at, events = _first_event(head, size)
                data = await pipe.getrange(key, at, at + PIECE_BYTES - 1)
                piece, length = leading(data, min(PIECE_EVENTS, events - taken))
                if not piece:
                    fault = f"is missing, not msgpack, or larger than {PIECE_BYTES:,} bytes"
                    raise InvalidInput(f"the event [{taken}] of {events} {fault}; the rest cannot be read")
                rest = EMPTY_JOB
            except InvalidInput as error:
                piece, length, events = [], 0, taken
                shown = f"{head.decode(errors='backslashreplace')}… ({size:,} bytes)"
                rest = serialize(burial(shown, str(error)))
            pipe.multi()  # type: ignore[no-untyped-call]  # redis-py has no types
            if piece:
                pieces[f"{job_id}:{taken}"] = score
                store(f"{key}:{taken}", serialize({"f": TIP_EVENTS, "a": [piece], "et": int(score)}))
            at, taken = at + length, taken + len(piece)
            if taken == events:
                store(key, rest)
                if pieces:
                    pipe.zadd(queue, pieces)
            try:
                await pipe.execute()
            except WatchError:  # it has expired, or another process has split or replaced it
                await split(redis, job_id)
                return


def _first_event(head: bytes, size: int) -> tuple[int, int]:
    """The offset of the first event in a `tip_events` job that begins with `head`, and the number of its events. Raises
    `InvalidInput` for any other job."""
    if size > MAX_JOB_BYTES:
        raise InvalidInput(f"the job has {size:,} bytes, more than {MAX_JOB_BYTES:,}; send several jobs")
    if head.startswith(_PICKLE):
        raise InvalidInput(PICKLED)
    if (found := _OPENING.match(head)) is None:
        wanted = f"{TIP_EVENTS} with one argument, a list of events, as arq writes it"
        raise InvalidInput(f"a job of more than {PIECE_BYTES:,} bytes must be {wanted}")
    few, many, most = found.groups()
    return found.end(), few[0] & 0x0F if few else int.from_bytes(many or most)


def leading(data: bytes, most: int) -> tuple[list[object], int]:
    """Up to `most` complete values at the start of concatenated msgpack, and the offset at which the last one ends."""
    values: list[object] = []
    begin, view = 0, memoryview(data)
    while len(values) < most:
        end = len(data)
        try:
            msgspec.msgpack.decode(view[begin:], type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError) as error:
            if (found := _TRAILING(str(error))) is None:  # the value is incomplete or invalid
                break
            end = begin + int(found[1])
        try:
            values.append(msgspec.msgpack.decode(view[begin:end]))
        except _UNDECODABLE:  # not an event: it becomes a dead letter
            values.append(data[begin:end].decode("utf-8", "backslashreplace"))
        begin = end
    return values, begin
