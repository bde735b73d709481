"""Clients of the run. Each sends, reads, rebuilds and erases as its seed determines, and records every operation.

If a write is not answered, or answered with 503, its outcome is unknown; the client sends it again under the same ids.
A status that the operation may not have is a violation by itself.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from random import Random
from time import monotonic_ns, time_ns
from typing import Any, NamedTuple

from arq.connections import ArqRedis

from app.stores.queue.jobs import TIP_EVENTS
from app.stores.valkey.pool import AWAY
from tests.support.http import Answer, Broken, Connection
from tests.torture.checker import Moments, Read, Write
from tests.torture.deployment import KEY, Deployment, ProcessSlot
from tests.torture.model import FEATURES, Event, draw
from tests.torture.records import RunRecord, UserRecord

ALL = (1 << len(FEATURES)) - 1
OK = (200, 202, 204)
UNAVAILABLE = (503, 507)  # 507: the disk is full
BY_WORKER = "rebuild by a worker"
RESEND_AFTER_NS = 4_000_000_000
MAX_BY_QUEUE = 3
ERASABLE = 0.2
MANY = 200


class Reply(NamedTuple):
    """The answer to a request, None if there was none; when it began and ended; and what the clock of the process may
    have shown meanwhile. A beginning of 0 means that the request was not sent."""

    answer: Answer | None
    start: int
    end: int
    moments: Sequence[Moments]

    @property
    def good(self) -> Any:
        """The JSON of an answer with the status 200; else None."""
        return self.answer.json if self.answer is not None and self.answer.status == 200 else None


class UserPool:
    """The users of the run. A user whose record is full is judged and replaced by a new one."""

    def __init__(self, deployment: Deployment, run: RunRecord, seed: int, size: int, *, erasable: float) -> None:
        self.deployment = deployment
        self.run = run
        self.seed = seed
        self._erasable = erasable
        self._random = Random(f"users/{seed}")
        self._numbers = 0
        self.users = [self._new() for _ in range(size)]
        self.leaving: list[UserRecord] = []

    def pick(self, random: Random) -> UserRecord:
        """A random user; some are picked far more often than others."""
        index = min(int(random.paretovariate(0.7)) - 1, len(self.users) - 1)
        if random.random() < 0.3:
            index = random.randrange(len(self.users))
        user = self.users[index]
        if user.full:
            self.leaving.append(user)
            user = self.users[index] = self._new()
        return user

    def pick_several(self, random: Random, count: int) -> list[UserRecord]:
        """At most `count` different users."""
        return list({user.user_id: user for user in (self.pick(random) for _ in range(count))}.values())

    def number(self) -> int:
        """A number that occurs once in the run."""
        self._numbers += 1
        return self._numbers

    def all(self) -> list[UserRecord]:
        return [*self.users, *self.leaving]

    def _new(self) -> UserRecord:
        return UserRecord(f"user-{self.seed}-{self.number()}", self._random.random() < self._erasable)


class Client:
    """One client, with a connection to each API process."""

    strict = False  # with True, every request must be answered, and not with 503 or 507

    def __init__(self, name: int, pool: UserPool, queue: ArqRedis) -> None:
        self._pool = pool
        self._run = pool.run
        self._deployment = pool.deployment
        self._random = Random(f"client/{pool.seed}/{name}")
        self._name = f"{pool.seed}-{name}"
        self._queue = queue
        self._connections: dict[tuple[str, int], Connection] = {}

    async def run(self, weights: Mapping[str, float], pause_s: float) -> None:
        """Choose operations by weight until the run stops, with a pause of `pause_s` on average between them."""
        operations = self.operations()
        while not self._run.stop.is_set():
            (name,) = self._random.choices(list(weights), weights=list(weights.values()))
            await operations[name]()
            await asyncio.sleep(self._random.uniform(0, 2 * pause_s))

    def operations(self) -> dict[str, Callable[[], Awaitable[object]]]:
        return {
            "read": lambda: self.read(self._pool.pick(self._random)),
            "batch": self._batch,
            "send": self._send,
            "send many": self._send_many,
            "relay": self._relay,
            "edge": self._edge,
            "publish": self._publish,
            "rebuild": self._rebuild,
            "rebuild several": self._rebuild_several,
            "erase": self._erase,
            "score": self._score,
        }

    async def close(self) -> None:
        for connection in self._connections.values():
            await connection.close()

    # Reads.

    async def read(self, user: UserRecord, slot: ProcessSlot | None = None) -> bool:
        """Read one profile, in one of the forms of the request; False if the read failed."""
        form = self._random.random()
        path, asked = f"/profiles/{user.user_id}", ALL
        if form < 0.15:
            asked = self._random.randint(1, ALL)
            path += "?features=" + ",".join(name for index, name in enumerate(FEATURES) if asked >> index & 1)
        elif form < 0.3:
            path += "?detail=true"
        reply = await self._ask("read", "GET", path, [user], slot=slot)
        if found := reply.good:
            _record_read(user, [reply], asked, found["features"])
        return bool(found)

    async def _batch(self) -> None:
        users = self._pool.pick_several(self._random, 12)
        body = {"user_ids": [user.user_id for user in users]}
        reply = await self._ask("batch", "POST", "/profiles/batch", users, body)
        if found := reply.good:
            for user, profile in zip(users, found["profiles"], strict=True):
                _record_read(user, [reply], ALL, profile["features"])

    async def _rebuild(self) -> None:
        user = self._pool.pick(self._random)
        reply = await self._ask("rebuild", "POST", f"/admin/users/{user.user_id}/rebuild", [user])
        if found := reply.good:
            _record_read(user, [reply], ALL, found["features"])

    async def _rebuild_several(self) -> None:
        """Let a worker rebuild users. The answer has no values to judge, but the worker fills the cache."""
        users = self._pool.pick_several(self._random, 12)
        body = {"user_ids": [user.user_id for user in users]}
        # 409: another rebuild is in progress.
        await self._ask(BY_WORKER, "POST", "/admin/rebuilds", users, body, allowed=(*OK, 409))

    # Writes.

    async def _send(self) -> None:
        users = self._pool.pick_several(self._random, 2)
        if self._random.random() < 0.6:
            users = users[:1]
        await self._send_until_acknowledged(
            [(user, self._event()) for user in users for _ in range(self._random.choice([1, 1, 1, 2, 3]))]
        )
        # The producer reads at once, usually from another process.
        for user in users:
            await self.read(user)

    async def _send_many(self) -> None:
        user = self._pool.pick(self._random)
        await self._send_until_acknowledged([(user, self._event()) for _ in range(MANY)])

    async def _relay(self) -> None:
        """Send an event to one process, and read from another at once."""
        user = self._pool.pick(self._random)
        first, second = self._random.sample(self._deployment.apis, 2)
        if await self.send([(user, self._event(first))], first):
            await self.read(user, second)

    async def _edge(self) -> None:
        """Send an event that soon leaves the window, and read just before and just after it does."""
        user, slot = self._pool.pick(self._random), self._random.choice(self._deployment.apis)
        event = self._event(slot, self._random.randrange(50, 500))
        await self._send_until_acknowledged([(user, event)])
        await self.read(user, slot)
        await asyncio.sleep(min(max(0, event.leaves_ms - slot.clock.now_ms() - 2) / 1000, 1))
        for _ in range(6):
            await self.read(user, slot)

    def _event(self, slot: ProcessSlot | None = None, stays_ms: int | None = None) -> Event:
        """An event; `slot` is the process by whose clock it leaves the window `stays_ms` from now."""
        number = self._pool.number()
        slot = slot or self._random.choice(self._deployment.apis)
        return draw(self._random, f"{self._name}-{number}", number, slot.clock.now_ms(), stays_ms)

    async def _send_until_acknowledged(self, events: Sequence[tuple[UserRecord, Event]]) -> None:
        for user, _ in events:
            user.in_progress += 1
        try:
            while not (await self.send(events) or self._run.stop.is_set()):
                for user in {user.user_id: user for user, _ in events}.values():
                    await self.read(user)
                await asyncio.sleep(self._random.uniform(0.01, 0.2))
        finally:
            for user, _ in events:
                user.in_progress -= 1

    async def send(self, events: Sequence[tuple[UserRecord, Event]], slot: ProcessSlot | None = None) -> bool:
        """Send events in one request; True if they were acknowledged."""
        body = [event.payload(user.user_id) for user, event in events]
        self._run.sent.update(event.event_id for _, event in events)
        masks: dict[str, int] = {}
        users = {user.user_id: user for user, _ in events}
        for user, event in events:
            masks[user.user_id] = masks.get(user.user_id, 0) | user.bit(event)
        answer, start, end, _ = await self._ask("send", "POST", "/events", list(users.values()), body, slot=slot)
        if start == 0:
            return False
        new: bool | None = None
        acknowledged = answer is not None and answer.status == 202
        if acknowledged:
            assert answer is not None
            receipt = answer.json
            new = {len(events): True, 0: False}.get(receipt["accepted"])
            if receipt["accepted"] + receipt["duplicates"] != len(events):
                self._run.violated(f"the receipt of {len(events)} events does not add up: {receipt}")
            if new is None and not any(user.erasable for user in users.values()):
                self._run.violated(f"a request of {len(events)} events had been stored in part: {receipt}")
            self._run.acknowledged.update(event.event_id for user, event in events if not user.erasable)
        for user_id, mask in masks.items():
            users[user_id].history.writes.append(Write(start, end if acknowledged else None, mask, new=new))
        return acknowledged

    async def send_again(self, user: UserRecord, limit: int) -> None:
        """Send acknowledged events again; the checker demands that the receipt calls all of them known."""
        known = [event for event in user.history.events if event.event_id in self._run.acknowledged]
        if known:
            await self.send([(user, event) for event in known[:limit]])

    async def _publish(self) -> None:
        user = self._pool.pick(self._random)
        if user.erasable or len(user.by_queue) >= MAX_BY_QUEUE:
            return
        event = self._event()
        self._run.operations["publish"] += 1
        self._run.sent.add(event.event_id)
        user.by_queue[event.event_id] = len(user.history.writes)
        user.history.writes.append(Write(monotonic_ns(), None, user.bit(event)))
        try:
            await self._queue.enqueue_job(TIP_EVENTS, [event.payload(user.user_id)])
        except AWAY:
            self._run.unanswered["publish"] += 1

    async def resend_by_http(self, user: UserRecord, event_id: str) -> None:
        """Send an event over HTTP, under the same id, that the queue seems to have lost."""
        event = user.history.events[user.indices[event_id]]
        if await self.send([(user, event)]):
            user.by_queue.pop(event_id, None)

    async def _erase(self) -> None:
        user = self._pool.pick(self._random)
        if not user.erasable:
            return
        answer, start, end, _ = await self._ask("erase", "DELETE", f"/admin/users/{user.user_id}", [user])
        if start:
            done = answer is not None and answer.status == 204
            user.history.writes.append(Write(start, end if done else None, 0, erases=True))
            await self.read(user)

    # Decisions. Later feedback about the tip `tip` settles the user's last decision that offered it.

    async def _score(self) -> None:
        user = self._pool.pick(self._random)
        features = {"is_overdue": True, "task_age_days": self._random.randint(0, 9), "priority": 1}
        body = {
            "user_id": user.user_id,
            "request_id": f"{self._name}-{self._pool.number()}",
            "candidates": [{"id": name, "features": features} for name in self._random.choice([["tip"], ["tip", "b"]])],
        }
        replies = [await self._ask("score", "POST", "/score", [user], body) for _ in range(2)]
        found = {answer["decision_id"] for reply in replies if (answer := reply.good)}
        if user.erasable:  # the decision may be gone, and the second one another
            return
        if len(found) > 1:
            self._run.violated(f"one request was answered with two decisions: {found}")
        self._run.decisions |= found
        for decision_id in found:
            if logged := (await self._ask("decision", "GET", f"/decisions/{decision_id}", [user])).good:
                _record_read(user, replies, ALL, logged["profile"]["features"])  # which one of the requests has read

    async def _ask(
        self,
        name: str,
        method: str,
        path: str,
        users: Sequence[UserRecord],
        body: Any = None,
        *,
        slot: ProcessSlot | None = None,
        allowed: Collection[int] = OK,
    ) -> Reply:
        up = [slot] if slot is not None and slot.up else [each for each in self._deployment.apis if each.up]
        if not up:
            await asyncio.sleep(0.02)
            return Reply(None, 0, 0, ())
        slot = self._random.choice(up)
        place = slot.host, slot.port
        connection = self._connections.get(place)
        if connection is None:
            connection = self._connections[place] = Connection(slot.port, host=slot.host)
        for user in users:
            user.in_progress += 1
        began, start = time_ns(), monotonic_ns()
        try:
            answer = await connection.send(_request(method, path, body))
        except Broken:
            self._connections.pop(place, None)
            self._run.unanswered[name] += 1
            self._run.operations[name] += 1
            if self.strict:
                self._run.violated(f"{method} {path} was not answered")
            return Reply(None, start, end := monotonic_ns(), slot.clock.shown((start, began), (end, time_ns())))
        finally:
            for user in users:
                user.in_progress -= 1
        end = monotonic_ns()
        moments = slot.clock.shown((start, began), (end, time_ns()))
        self._run.operations[name] += 1
        self._run.statuses[f"{name} {answer.status}"] += 1
        self._run.slowest_s = max(self._run.slowest_s, answer.seconds)
        if answer.status not in allowed and (self.strict or answer.status not in UNAVAILABLE):
            self._run.violated(f"{method} {path} was answered with {answer.status}: {answer.body[:500]!r}")
        return Reply(answer, start, end, moments)


def _request(method: str, path: str, body: Any) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEY}\r\n"
    if body is None:
        return (head + ("Content-Length: 0\r\n\r\n" if method == "POST" else "\r\n")).encode()
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent


def _record_read(user: UserRecord, replies: Sequence[Reply], asked: int, features: dict[str, Any]) -> None:
    """Record what one of these requests has read."""
    shown = (features.get(name) for name in FEATURES)
    seen = tuple(item["value"] if isinstance(item, dict) else item for item in shown)  # a dict with `detail=true`
    sent = [reply for reply in replies if reply.start]
    moments = [each for reply in sent for each in reply.moments]
    user.history.reads.append(Read(sent[0].start, max(reply.end for reply in sent), asked, seen, moments))
