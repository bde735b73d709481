"""What every request passes, where no server is needed to show it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from litestar.types import Receive, Scope, Send

from app.api.gateway import Gateway
from app.telemetry import Metrics

SCOPE: Any = {
    "type": "http",
    "method": "GET",
    "path": "/features",
    "raw_path": b"/features",
    "query_string": b"",
    "headers": [],
}


async def nothing(*_: object) -> Any:
    """Neither receives nor sends."""


async def test_request_is_no_fault_of_the_service_when_it_was_cut_short() -> None:
    reached = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        reached.set()
        await asyncio.Event().wait()

    metrics = Metrics()
    request = asyncio.get_running_loop().create_task(Gateway(endless, metrics)(SCOPE, nothing, nothing))
    await reached.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    counted = {
        sample.labels["status"]: sample.value
        for family in metrics.collectors.collect()
        for sample in family.samples
        if sample.name == "profiles_http_request_duration_seconds_count"
    }
    assert counted == {"499": 1}
