"""What a program with one more action makes of it: run by `test_actions.py`, prints JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from app.bandit.learning.attribution import outcome_rewards
from app.cli.demo_set import generate
from app.features.events import TipFeedback
from app.settings import Settings
from tests.support.clock import NOW_MS
from tests.support.events import feedback, payload, served
from tests.support.live import Live, live

NAME = "shared"
CANDIDATE = {"id": "tip", "features": {"is_overdue": True, "task_age_days": 3, "priority": 1}}


async def _found(site: Live) -> dict[str, Any]:
    async def get(path: str) -> Any:
        return (await site.client.get(path)).raise_for_status().json()

    asked = await site.client.post("/score", json={"user_id": "ann", "candidates": [CANDIDATE]})
    decision_id = asked.raise_for_status().json()["decision_id"]
    now_ms = site.now_ms
    await site.send(
        served("ann", now_ms, decision_id=decision_id), feedback("ann", now_ms, NAME, decision_id=decision_id)
    )
    await site.service.bandit.learner.learn(await site.service.consumer.log.unconsumed(now_ms + 60_000, 10))
    refused = await site.client.post("/events", json=payload(feedback("ann", now_ms), action="liked"))
    assert refused.status_code == 422
    schemas = (await get("/schema/openapi.json"))["components"]["schemas"]
    days = (await get("/admin/users/ann/development"))["days"]
    page = await site.client.get("/admin/users/ann", headers={"Accept": "text/html"})
    return {
        "profile": await site.features("ann"),
        "outcome": (await get(f"/decisions/{decision_id}"))["outcome"],
        "issue": refused.json()["errors"][0],
        "openapi": {"action": schemas["Action"]["enum"], "day": list(schemas["DailyTips"]["properties"])},
        "days": {kind: sum(day[kind] for day in days) for kind in days[0] if kind not in ("start", "end")},
        "page": page.raise_for_status().text,
    }


async def _main(database: Path) -> None:
    async with live(Settings(database=database, shadow=False)) as site:
        found = await _found(site)
    overridden = Settings.from_environment({"PROFILES_REWARDS": f"{NAME}=0.75"})
    found["overridden"] = outcome_rewards(overridden.rewards)[NAME]
    events = generate(users=100, days=60, seed=1, now_ms=NOW_MS)
    found["demo"] = Counter(str(event.action) for event in events if isinstance(event, TipFeedback))
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
