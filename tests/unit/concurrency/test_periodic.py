"""Work that is repeated in the background."""

from __future__ import annotations

import asyncio

import pytest

from app.concurrency import periodic
from app.concurrency.periodic import repeat
from app.errors import StoreFull, StoreUnavailable
from tests.support.logs import Recorder


async def test_work_is_repeated_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = Recorder()
    monkeypatch.setattr(periodic, "log", logs)
    errors = iter([StoreUnavailable("away"), RuntimeError("a defect"), StoreFull("full")])
    pauses: list[float] = []

    async def work() -> None:
        for error in errors:
            raise error

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await repeat("sweep", work, 2.0, pause)
    assert [(line["event"], line["name"]) for line in logs.lines][:2] == [
        ("run_put_off", "sweep"),
        ("run_failed", "sweep"),
    ]
    assert pauses == [2.0] * 4
