"""Work that is repeated in the background."""

from __future__ import annotations

import asyncio

import pytest

from app.concurrency import tasks
from app.concurrency.tasks import repeat
from app.errors import StoreUnavailable
from tests.support.logs import Recorder


async def test_work_is_repeated_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = Recorder()
    monkeypatch.setattr(tasks, "log", logs)
    away, defect = StoreUnavailable("away"), RuntimeError("a defect")
    outcomes = iter([away, away, None, away, defect, defect])
    pauses: list[float] = []

    async def work() -> None:
        if (outcome := next(outcomes)) is not None:
            raise outcome

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 6:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await repeat("sweep", work, 2.0, pause)
    assert pauses == [2.0] * 6
    assert [line["level"] for line in logs.lines] == ["warning", "debug", "warning", "exception", "exception"]
    assert {line["name"] for line in logs.lines} == {"sweep"}
