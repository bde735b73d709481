"""Clients that notice any request that is lost while processes stop, die or are replaced."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.events import payload, served
from tests.support.http import Broken, Connection, Refused
from tests.support.traffic import now_ms
from tests.support.waiting import eventually

CLIENTS = 8


class Senders:
    """Clients that send an event and read its user, over and over. They try again where they were refused.

    Half of them keep their connection; the others connect for each request, so that some wait to be let in whenever a
    socket is closed. `lost` holds what was sent and not answered, or not accepted.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers = 0
        self.refused = 0
        self.acknowledged: Counter[str] = Counter()
        self.lost: list[str] = []
        self.over = False

    async def run(self, number: int) -> None:
        connection = Connection(self.port)
        user, sent = f"client-{number}", 0
        while not self.over:
            if connection.port != self.port or number % 2:
                await connection.close()
                connection = Connection(self.port)
            event = payload(served(user, now_ms()), event_id=f"{number}-{sent}")
            try:
                answer = await connection.post("/events", event)
                if answer.status == 202:
                    self.acknowledged[event["event_id"]] += 1
                    sent += 1
                else:
                    self.lost.append(f"{answer.status} for an event of {user}")
                shown = (await connection.get(f"/profiles/{user}")).json["features"]["tip_volume_30d"]
                if shown != sent:
                    self.lost.append(f"{user}: {shown} shown, {sent} sent")
                self.answers += 2
            except Refused:
                self.refused += 1
                await asyncio.sleep(0)
            except Broken as error:
                self.lost.append(str(error))
        await connection.close()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[Senders]:
        """Run `CLIENTS` clients until the block ends, and until each has its last answer."""
        running = [asyncio.create_task(self.run(number)) for number in range(CLIENTS)]
        try:
            yield self
        finally:
            self.over = True
            await asyncio.gather(*running)

    async def answered(self, count: int) -> None:
        """Return when so many more requests have been answered."""
        enough = self.answers + count
        await eventually(lambda: self.answers >= enough)
