"""A value that should not be in the cache: a running worker finds it, repairs it, and the overview tells of it."""

from __future__ import annotations

import json

import pytest

from app.profiles.online.cache_protocol import FeatureValue, decode, encode
from tests.support.events import payload, served
from tests.support.fleet import Fleet, counted
from tests.support.http import Connection
from tests.support.registry import REGISTRY
from tests.support.servers import ask, keys
from tests.support.traffic import now_ms
from tests.support.waiting import eventually_async

VOLUME = b"tip_volume_30d"
WRONG = b"4711"


def spoil(fleet: Fleet) -> None:
    """Put another value where the right one stands, as a defect of the protocol would."""
    (name,) = (key for key in keys(fleet.cache) if key.endswith(VOLUME))
    held = decode(ask(fleet.cache, "GET", name))
    assert isinstance(held, FeatureValue)
    assert held.fingerprint == REGISTRY.named(VOLUME.decode()).fingerprint.encode()
    ask(fleet.cache, "SET", name, encode(held._replace(json=WRONG)))


@pytest.mark.slow
async def test_worker_finds_repairs_and_reports_a_violation(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1, near_users=0)
    worker = fleet.worker(log_format="json")
    connection = Connection(api.port)

    async def watching() -> bool:
        """What came before the worker's first look is not watched."""
        await connection.post("/events", payload(served("bob", now_ms())))
        return await counted(worker.port, "consistency_checks_total", after="1s") > 0

    await eventually_async(watching, step_s=0.2)
    assert (await connection.post("/events", payload(served("ada", now_ms())))).status == 202

    async def volume() -> int:
        shown: int = (await connection.get("/profiles/ada")).json["features"][VOLUME.decode()]
        return shown

    async def cached() -> bool:
        """The fill follows the answer: until it has landed the key holds a lease."""
        if await volume() != 1:
            return False
        return any(key.endswith(VOLUME) and decode(ask(fleet.cache, "GET", key)) for key in keys(fleet.cache))

    await eventually_async(cached)
    spoil(fleet)
    assert await volume() == int(WRONG)

    async def right_again() -> bool:
        return await volume() == 1

    await eventually_async(right_again, step_s=0.1)

    async def repaired() -> bool:
        """If the worker's other work had repaired it, nothing would have been counted."""
        return await counted(worker.port, "consistency_repairs_total") == 1

    await eventually_async(repaired)
    assert await counted(worker.port, "consistency_violations_total", fault="unexplained") == 1
    (line,) = [json.loads(line) for line in worker.program.output.splitlines() if "consistency_violation" in line]
    assert (line["feature"], line["held"], line["computed"]) == (VOLUME.decode(), WRONG.decode(), "1")
    assert "ada" not in json.dumps(line)

    async def told() -> bool:
        found = json.loads((await connection.get("/admin")).body)["findings"]
        return any(item["subject"] == "untrue" for item in found)

    await eventually_async(told, step_s=0.2)
    await connection.close()


@pytest.mark.slow
async def test_worker_checks_the_profiles_of_decisions(fleet: Fleet) -> None:
    (api,) = await fleet.apis(1)
    worker = fleet.worker()
    connection = Connection(api.port)
    candidate = {"id": "tip", "features": {"is_overdue": False, "task_age_days": 1, "priority": 1}}
    request = {"user_id": "ada", "candidates": [candidate]}

    async def checked() -> bool:
        """What was decided before the worker's first look is not checked."""
        assert (await connection.post("/score", request)).status == 200
        return await counted(worker.port, "decision_checks_total", outcome="consistent") > 0

    await eventually_async(checked, step_s=0.2)
    assert await counted(worker.port, "decision_checks_total", outcome="violation") == 0
    await connection.close()
