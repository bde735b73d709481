"""A process that dies between an event's commit and the deletion of its keys: sending again makes good for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from app.bootstrap.service import open_service
from app.events.validation import admit
from app.settings import Settings
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.events import served
from tests.support.processes import ROOT
from tests.support.registry import FEATURES

VOLUME = 4

# Ingests the event in argv, and kills itself where it would delete the keys.
_DYING = """
import asyncio, os, signal, sys
from pathlib import Path
from app.bootstrap.service import open_service
from app.events.validation import decode_json
from app.settings import Settings
from tests.support.registry import FEATURES

async def main():
    settings = Settings(features=FEATURES, database=Path(sys.argv[1]), cache_url=sys.argv[2])
    async with open_service(settings, door="http") as service:
        service.cache.drop = lambda cells: os.kill(os.getpid(), signal.SIGKILL)
        await service.ingestor.ingest(decode_json(sys.argv[3].encode()))

asyncio.run(main())
"""


async def test_event_counts_once_when_it_is_sent_again(database_path: Path, valkey: EmbeddedServer) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url=valkey.url)
    async with open_service(settings, door="http") as service:
        event = served("ada", service.clock.now_ms() - 1_000)
        await service.rebuilder.rebuild(["ada"], 1 << VOLUME)
        died = subprocess.run(  # noqa: ASYNC221  # nothing else has to go on meanwhile
            [sys.executable, "-c", _DYING, str(database_path), valkey.url, msgspec.json.encode(event).decode()],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
            timeout=60,
        )
        assert died.returncode == -signal.SIGKILL
        before = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
        assert (before.json, before.cached) == (b"0", True), "the key is still there: this is the case in question"

        receipt = await service.ingestor.ingest([event])
        assert (receipt.accepted, receipt.duplicates, receipt.invalidated) == (0, 1, True)
        after = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
        assert (after.json, after.cached) == (b"1", False)


async def test_sweep_consumes_an_event_that_is_not_resent(database_path: Path, valkey: EmbeddedServer) -> None:
    settings = Settings(features=FEATURES, database=database_path, cache_url=valkey.url)
    async with open_service(settings, door="queue") as service:
        event = served("ada", service.clock.now_ms() - 10_000)
        await service.rebuilder.rebuild(["ada"], 1 << VOLUME)
        admitted = admit([event], service.clock.now_ms() - 5_000, 180)
        await service.consumer.log.append([admitted])  # what a process has done that dies here
        assert await service.consumer.sweep() == 1
        after = (await service.reader.read({"ada": 1 << VOLUME}))["ada"][VOLUME]
        assert (after.json, after.cached) == (b"1", False)
