"""Clients: each sends, reads, rebuilds and erases as its seed says, and writes down when an operation began and ended.

Whatever is not answered, or answered with 503, may have happened or not; it is sent again under the same id. Any other
status than those an operation may have is a violation by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from random import Random
from time import monotonic_ns, time
from typing import Any

from arq.connections import ArqRedis

from app.stores.queue.client import TIP_EVENTS
from app.stores.valkey.pool import AWAY
from tests.support.http import Answer, Broken, Connection
from tests.torture.books import Book, Ledger
from tests.torture.checker import Read, Write
from tests.torture.facts import FEATURES, Fact, draw
from tests.torture.site import Site, Slot

ALL = (1 << len(FEATURES)) - 1
ALLOWED = (200, 202, 204, 503, 507)  # the last: the disk is full
BY_WORKER = "rebuild by a worker"
LATE_NS = 4_000_000_000
MAX_BY_QUEUE = 3
ERASABLE = 0.2


class Crowd:
    """The users who are about, and who keeps their books. A user whose book is full is judged and replaced."""

    def __init__(self, site: Site, ledger: Ledger, seed: int, size: int) -> None:
        self.site = site
        self.ledger = ledger
        self.seed = seed
        self._random = Random(f"crowd/{seed}")
        self._numbers = 0
        self.books = [self._new() for _ in range(size)]
        self.leaving: list[Book] = []

    def pick(self, random: Random) -> Book:
        """A user; some are asked for far more often than others."""
        place = min(int(random.paretovariate(0.7)) - 1, len(self.books) - 1)
        if random.random() < 0.3:
            place = random.randrange(len(self.books))
        book = self.books[place]
        if book.full:
            self.leaving.append(book)
            book = self.books[place] = self._new()
        return book

    def number(self) -> int:
        """Different for every fact of the run."""
        self._numbers += 1
        return self._numbers

    def _new(self) -> Book:
        self._numbers += 1
        return Book(f"user-{self.seed}-{self._numbers}", self._random.random() < ERASABLE)


class Client:
    """One client, with a connection to each API process."""

    def __init__(self, name: int, crowd: Crowd, queue: ArqRedis) -> None:
        self._crowd = crowd
        self._ledger = crowd.ledger
        self._site = crowd.site
        self._random = Random(f"client/{crowd.seed}/{name}")
        self._name = f"{crowd.seed}-{name}"
        self._queue = queue
        self._connections: dict[int, Connection] = {}

    async def run(self) -> None:
        """Until the run stops."""
        actions = [
            self._read,
            self._batch,
            self._send,
            self._publish,
            self._rebuild,
            self._rebuild_many,
            self._erase,
            self._score,
        ]
        while not self._ledger.stop.is_set():
            (action,) = self._random.choices(actions, weights=[62, 6, 22, 4, 3, 0.5, 1.5, 3])
            await action()

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            await connection.close()

    # Reads.

    async def _read(self) -> None:
        await self.read(self._crowd.pick(self._random))

    async def read(self, book: Book, slot: Slot | None = None) -> bool:
        """One user's profile, in one of the forms it can be asked for; whether there was an answer."""
        form = self._random.random()
        path, asked = f"/profiles/{book.user_id}", ALL
        if form < 0.15:
            asked = self._random.randint(1, ALL)
            path += "?features=" + ",".join(name for place, name in enumerate(FEATURES) if asked >> place & 1)
        elif form < 0.3:
            path += "?detail=true"
        answer, call, end = await self._ask("read", slot, "GET", path, [book])
        if answer is not None and answer.status == 200:
            _saw(book, call, end, asked, answer.json["features"])
            return True
        return False

    async def _batch(self) -> None:
        books = list({book.user_id: book for book in (self._crowd.pick(self._random) for _ in range(12))}.values())
        body = {"user_ids": [book.user_id for book in books]}
        answer, call, end = await self._ask("batch", None, "POST", "/profiles/batch", books, body)
        if answer is not None and answer.status == 200:
            for book, profile in zip(books, answer.json["profiles"], strict=True):
                _saw(book, call, end, ALL, profile["features"])

    async def _rebuild(self) -> None:
        book = self._crowd.pick(self._random)
        path = f"/admin/users/{book.user_id}/rebuild"
        answer, call, end = await self._ask("rebuild", None, "POST", path, [book])
        if answer is not None and answer.status == 200:
            _saw(book, call, end, ALL, answer.json["features"])

    async def _rebuild_many(self) -> None:
        """By a worker, beside everything else; it answers nothing to judge, but fills."""
        books = list({book.user_id: book for book in (self._crowd.pick(self._random) for _ in range(12))}.values())
        body = {"user_ids": [book.user_id for book in books]}
        await self._ask(BY_WORKER, None, "POST", "/admin/rebuilds", books, body)

    # Writes.

    async def _send(self) -> None:
        books = list({book.user_id: book for book in (self._crowd.pick(self._random) for _ in range(2))}.values())
        if self._random.random() < 0.6:
            books = books[:1]
        facts = [(book, self._fact()) for book in books for _ in range(self._random.choice([1, 1, 1, 2, 3]))]
        if await self.send(facts):
            # Who was just told reads at once, mostly elsewhere.
            for book in books:
                await self.read(book)
        else:
            await self._insist(facts)

    def _fact(self) -> Fact:
        number = self._crowd.number()
        return draw(self._random, f"{self._name}-{number}", number, int(time() * 1000))

    async def send(self, facts: Sequence[tuple[Book, Fact]]) -> bool:
        """Events in one request; whether they were acknowledged."""
        body = [fact.payload(book.user_id) for book, fact in facts]
        self._ledger.sent.update(fact.event_id for _, fact in facts)
        masks: dict[str, int] = {}
        books = {book.user_id: book for book, _ in facts}
        for book, fact in facts:
            masks[book.user_id] = masks.get(book.user_id, 0) | book.place(fact)
        answer, start, end = await self._ask("send", None, "POST", "/events", list(books.values()), body)
        if start == 0:
            return False
        new: bool | None = None
        acknowledged = answer is not None and answer.status == 202
        if acknowledged:
            assert answer is not None
            receipt = answer.json
            new = True if receipt["accepted"] == len(facts) else False if receipt["duplicates"] == len(facts) else None
            self._ledger.acknowledged.update(fact.event_id for book, fact in facts if not book.erasable)
        for user_id, mask in masks.items():
            books[user_id].history.writes.append(Write(start, end if acknowledged else None, mask, new=new))
        return acknowledged

    async def _insist(self, facts: Sequence[tuple[Book, Fact]]) -> None:
        for book, _ in facts:
            book.under_way += 1
        try:
            while not self._ledger.stop.is_set():
                await asyncio.sleep(self._random.uniform(0.01, 0.2))
                if await self.send(facts):
                    break
                for book, _ in facts:
                    await self.read(book)
        finally:
            for book, _ in facts:
                book.under_way -= 1

    async def _publish(self) -> None:
        book = self._crowd.pick(self._random)
        if book.erasable or len(book.by_queue) >= MAX_BY_QUEUE:
            return
        fact = self._fact()
        self._ledger.operations["publish"] += 1
        self._ledger.sent.add(fact.event_id)
        book.by_queue[fact.event_id] = len(book.history.writes)
        book.history.writes.append(Write(monotonic_ns(), None, book.place(fact)))
        try:
            await self._queue.enqueue_job(TIP_EVENTS, [fact.payload(book.user_id)])
        except AWAY:
            self._ledger.unanswered["publish"] += 1

    async def send_late(self, book: Book, event_id: str) -> None:
        """What the queue seems to have lost, by the other door, under the same id."""
        fact = book.history.facts[book.places[event_id]]
        if await self.send([(book, fact)]):
            book.by_queue.pop(event_id, None)

    async def _erase(self) -> None:
        book = self._crowd.pick(self._random)
        if not book.erasable:
            return
        answer, start, end = await self._ask("erase", None, "DELETE", f"/admin/users/{book.user_id}", [book])
        if start:
            done = answer is not None and answer.status == 204
            book.history.writes.append(Write(start, end if done else None, 0, erases=True))
            await self.read(book)

    # Decisions. What is sent of the tip `tip` is learned for whoever was last scored with it.

    async def _score(self) -> None:
        book = self._crowd.pick(self._random)
        features = {"is_overdue": True, "task_age_days": self._random.randint(0, 9), "priority": 1}
        body = {
            "user_id": book.user_id,
            "request_id": f"{self._name}-{self._crowd.number()}",
            "candidates": [{"id": name, "features": features} for name in self._random.choice([["tip"], ["tip", "b"]])],
        }
        answers = [(await self._ask("score", None, "POST", "/score", [book], body))[0] for _ in range(2)]
        found = {answer.body for answer in answers if answer is not None and answer.status == 200}
        if len(found) > 1 and not book.erasable:
            self._ledger.violated(f"one request was answered with two decisions: {found}")
        if found and not book.erasable:
            self._ledger.decisions.update(json.loads(each)["decision_id"] for each in found)

    # The wire.

    async def _ask(
        self, what: str, slot: Slot | None, method: str, path: str, books: Sequence[Book], body: Any = None
    ) -> tuple[Answer | None, int, int]:
        """The answer, and when the request began and ended; a beginning of 0: it was never sent."""
        up = [each for each in self._site.apis if each.up] if slot is None else [slot]
        if not up:
            await asyncio.sleep(0.02)
            return None, 0, 0
        port = self._random.choice(up).port
        connection = self._connections.get(port)
        if connection is None:
            connection = self._connections[port] = Connection(port)
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        sent = b""
        if body is not None:
            sent = json.dumps(body).encode()
            head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n"
        elif method == "POST":
            head += "Content-Length: 0\r\n"
        for book in books:
            book.under_way += 1
        start = monotonic_ns()
        try:
            answer = await connection.send(head.encode() + b"\r\n" + sent)
        except Broken:
            self._connections.pop(port, None)
            self._ledger.unanswered[what] += 1
            self._ledger.operations[what] += 1
            return None, start, monotonic_ns()
        finally:
            for book in books:
                book.under_way -= 1
        end = monotonic_ns()
        self._ledger.operations[what] += 1
        self._ledger.statuses[f"{what} {answer.status}"] += 1
        self._ledger.slowest_s = max(self._ledger.slowest_s, answer.seconds)
        if answer.status not in ALLOWED and (what, answer.status) != (BY_WORKER, 409):  # one is under way
            self._ledger.violated(f"{method} {path} was answered with {answer.status}: {answer.body[:500]!r}")
        return answer, start, end


def _saw(book: Book, call: int, answer: int, asked: int, features: dict[str, Any]) -> None:
    shown = (features.get(name) for name in FEATURES)
    seen = tuple(item["value"] if isinstance(item, dict) else item for item in shown)  # with `detail=true`
    book.history.reads.append(Read(call, answer, asked, seen))
