"""A little of everything that clients send, at a steady rate: what the soak makes the service live with.

Users, events and nonsense are ever new, so whatever keeps something of each request is seen to grow.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from app.features.clock import DAY_MS, Clock, rfc3339
from app.stores.queue.client import TIP_EVENTS, connect
from tests.bench.load import get, post
from tests.bench.serving import KEY
from tests.support.http import Connection
from tests.support.registry import REGISTRY

CONNECTIONS = 16
PER_CONNECTION = 500
BATCH, EVENTS, ROWS = 20, 20, 50
TOO_LARGE = b"[" + b" " * 9_000_000 + b"]"
PROBES = ("/healthz", "/readyz", "/metrics", "/schema", "/schema/openapi.json")
EXPECTED = {
    "nonsense": {"4xx"},
    "too large": {"4xx"},
    "rebuild of everyone": {"202", "409"},
    "job": {"enqueued"},
    "hung up": {"unanswered"},
}


class Mixture:
    """Draws requests and events."""

    def __init__(self, users: Sequence[str], clock: Clock) -> None:
        self._users = users
        self._clock = clock
        self._numbers = itertools.count()
        self._random = random.Random(1)
        self._kinds: dict[str, tuple[float, Callable[[], bytes]]] = {
            "warm": (500, lambda: get(f"/profiles/{self._user()}", KEY)),
            "selected": (50, self._selected),
            "batch": (80, lambda: _post("/profiles/batch", {"user_ids": self._random.sample(self._users, BATCH)})),
            "cold": (100, lambda: get(f"/profiles/{self._new()}", KEY)),
            "detail": (40, lambda: get(f"/profiles/{self._user()}?detail=true", KEY)),
            "past": (10, lambda: get(f"/profiles/{self._user()}?as_of={self._past()}", KEY)),
            "history": (5, self._history),
            "event": (100, lambda: _post("/events", self._event())),
            "events": (15, lambda: _post("/events", self.events(EVENTS))),
            "nonsense": (80, self._nonsense),
            "too large": (0.1, lambda: post("/events", TOO_LARGE, KEY)),
            "probe": (15, lambda: get(self._random.choice(PROBES))),
            "page of a user": (4, lambda: get(f"/admin/users/{self._user()}", KEY)),
            "rebuild": (1, lambda: post(f"/admin/users/{self._user()}/rebuild", b"", KEY)),
        }

    def draw(self) -> tuple[str, bytes]:
        """The kind of the next request, and the request."""
        (kind,) = self._random.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])
        return kind, self._kinds[kind][1]()

    def events(self, count: int) -> list[dict[str, object]]:
        """New events, one in five of a user whom nobody has heard of."""
        return [self._event() for _ in range(count)]

    def _event(self) -> dict[str, object]:
        number = next(self._numbers)
        return {
            "subject": "signals.tip.feedback",
            "event_id": f"soak-{number}",
            "user_id": self._user() if number % 5 else self._new(),
            "tip_id": "tip",
            "occurred_at": rfc3339(self._clock.now_ms()),
            "action": "completed",
            "dwell_ms": number % 10_000,
        }

    def _selected(self) -> bytes:
        chosen = self._random.sample(REGISTRY.names, self._random.randint(1, 4))
        return get(f"/profiles/{self._user()}?features={','.join(chosen)}", KEY)

    def _history(self) -> bytes:
        rows = [{"user_id": self._user(), "as_of": self._past()} for _ in range(ROWS)]
        return _post("/profiles/history", {"rows": rows})

    def _nonsense(self) -> bytes:
        user, word = self._user(), self._new()
        return self._random.choice(
            [
                get(f"/{word}/{word}", KEY),
                get(f"/profiles/{user}?{word}=1", KEY),
                get(f"/profiles/{user}?features={word}", KEY),
                get(f"/profiles/{user}", word),
                get("/profiles/%zz", KEY),
                get(f"/profiles/{user}", KEY).replace(b"GET", word.upper().encode(), 1),
                post("/events", b"{", KEY),
                _post("/events", {**self._event(), "user_id": f"{word}/"}),
                _post("/events", {**self._event(), word: 1}),
                _post("/profiles/batch", {"user_ids": []}),
            ]
        )

    def _user(self) -> str:
        return self._random.choice(self._users)

    def _new(self) -> str:
        return f"new-{next(self._numbers)}"

    def _past(self) -> str:
        return rfc3339(self._clock.now_ms() - self._random.randrange(DAY_MS, 20 * DAY_MS))


class Clients:
    """They send a mixture until they are told to stop, and count what they were answered."""

    def __init__(self, port: int, queue_url: str, mixture: Mixture) -> None:
        self._port = port
        self._queue_url = queue_url
        self._mixture = mixture
        self.answers: Counter[tuple[str, str]] = Counter()

    async def send(self, rate: float, stop: asyncio.Event) -> None:
        """So many requests a second over several connections; beside them jobs, rebuilds, and callers who hang up."""
        queue = connect(self._queue_url)

        async def enqueue(events: list[dict[str, object]]) -> None:
            await queue.enqueue_job(TIP_EVENTS, events)
            self.answers["job", "enqueued"] += 1

        regularly: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (0.2, lambda: enqueue(self._mixture.events(10))),
            (10, lambda: enqueue([{"subject": "?"}])),
            (60, self._rebuild_everyone),
            (30, self._look_at_quality),
            (1, self._hang_up),
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(CONNECTIONS):
                    tasks.create_task(self._converse(rate / CONNECTIONS, stop))
                for period_s, work in regularly:
                    tasks.create_task(_every(period_s, work, stop))
        finally:
            await queue.aclose(close_connection_pool=True)

    def unexpected(self) -> list[str]:
        """What was answered otherwise than asked for, in words."""
        return [
            f"{count} × {kind}: {status}"
            for (kind, status), count in sorted(self.answers.items())
            if status not in EXPECTED.get(kind, {"2xx"})
        ]

    async def _converse(self, rate: float, stop: asyncio.Event) -> None:
        connection = Connection(self._port)

        async def ask() -> None:
            kind, request = self._mixture.draw()
            answer = await connection.send(request)
            self.answers[kind, f"{answer.status // 100}xx"] += 1
            if self.answers.total() % PER_CONNECTION == 0:
                await connection.close()

        try:
            await _every(1 / rate, ask, stop)
        finally:
            await connection.close()

    async def _rebuild_everyone(self) -> None:
        connection = Connection(self._port, KEY)  # the server closes one that is idle for so long
        answer = await connection.post("/admin/rebuilds", {"scope": "all"})
        self.answers["rebuild of everyone", str(answer.status)] += 1
        await connection.close()

    async def _look_at_quality(self) -> None:
        connection = Connection(self._port, KEY)
        answer = await connection.get("/admin/data-quality")
        self.answers["data quality", f"{answer.status // 100}xx"] += 1
        await connection.close()

    async def _hang_up(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(post("/events", b"[" + b" " * 10_000, KEY)[:5_000])
        await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        self.answers["hung up", "unanswered"] += 1


async def _every(period_s: float, work: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
    """At a steady pace; what took too long is not made up for."""
    loop = asyncio.get_running_loop()
    due = loop.time() + period_s * random.random()
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), max(0.0, due - loop.time()))
        if stop.is_set():
            return
        await work()
        due = max(due + period_s, loop.time())


def _post(path: str, value: object) -> bytes:
    return post(path, json.dumps(value).encode(), KEY)
