"""Pictures of the pages of a running service, for the READMEs and for a look at every page after a change.

`make screenshots` takes them of `make up`: every page, light and dark, wide and narrow, into `var/screenshots`. With
`ARGS=--readme` it takes those of the READMEs into `tests/browser/pictures`, and writes the fingerprint of the page
into each. Restart `make up` first: a process keeps the templates that it has loaded.

The demonstration set has no decisions. `ARGS=--decisions=6000` makes that many first, with feedback, so that the
roll-out has figures; this takes a minute. The decisions stay stored, and the bandit learns from them.
"""

import argparse
import asyncio
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Browser

from tests.support.browser import NARROW, WIDE, Scheme, chromium
from tests.support.pictures import IN_READMES, PICTURES, fingerprint, stamped
from tests.support.waiting import eventually_async

PAGES = {
    "overview": "/admin",
    "user": "/admin/users/user-0007",
    "erase": "/admin/users/user-0007/erase",
    "find": "/admin/users?prefix=user-00",
    "data-quality": "/admin/data-quality",
    "rebuilds": "/admin/rebuilds",
    "decisions": "/admin/decisions",
    "rollout": "/admin/rollout",
    "dead-letters": "/admin/dead-letters",
    "features": "/admin/features",
    "keys": "/admin/keys",
    "audit": "/admin/audit",
    "sign-in": "/admin/sign-in",
    "error": "/admin/nowhere",
}
AT_ONCE, USERS = 8, 300
LOOK_WITHIN_S = 90
READ_S, SHOWN_WITHIN_S = 20, 60
REFRESH = "/admin/data-quality/refresh"


async def shoot(browser: Browser, url: str, scheme: Scheme, width: int, *, height: int | None = None) -> bytes:
    """A picture of a page: of the whole page, or of the upper `height` pixels."""
    context = await browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height or 900})
    page = await context.new_page()
    await page.goto(url)
    picture = await page.screenshot(full_page=height is None)
    await context.close()
    return picture


async def use(url: str) -> None:
    """Read profiles for a while, so that values are cached and latencies known; then have data quality measured."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        users = [f"user-{number:04d}" for number in range(1, 901)]
        (await client.post("/profiles/batch", json={"user_ids": users})).raise_for_status()
        deadline = time.monotonic() + READ_S
        while time.monotonic() < deadline:
            (await client.get(f"/profiles/{random.choice(users)}")).raise_for_status()
            await asyncio.sleep(0.01)
        requested_at = (await client.post(REFRESH)).raise_for_status().json()["requested_at"]

        async def shown() -> bool:
            """Whether the report is stored, and every process has stored a sample since it was requested."""
            report, overview = (await client.get(REFRESH)).json(), (await client.get("/admin")).json()
            seen = [process["last_seen"] for process in overview["processes"]]
            return report["finished_at"] is not None and all(at > requested_at for at in seen)

        await eventually_async(shown, SHOWN_WITHIN_S, 1)


async def decide(url: str, decisions: int) -> None:
    """Request decisions, send feedback for each by the user's habits, and wait until a worker has evaluated them."""
    chance, run = random.Random(), time.time_ns()
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for first in range(0, decisions, AT_ONCE):
            batch = range(first, min(first + AT_ONCE, decisions))
            pairs = await asyncio.gather(*(_answered(client, f"{run}-{number}", chance) for number in batch))
            answer = await client.post("/events", json=[event for pair in pairs for event in pair])
            answer.raise_for_status()
        deadline = time.monotonic() + LOOK_WITHIN_S
        while time.monotonic() < deadline:
            seen = (await client.get("/admin/rollout")).json()
            over = seen["stage"] in ("promoted", "rolled back")
            if over or seen["decisions"]["evaluated"] < seen["decisions"]["next_look_at"]:
                return
            await asyncio.sleep(1)


async def _answered(client: httpx.AsyncClient, request_id: str, chance: random.Random) -> list[dict[str, Any]]:
    """Request one decision and return the events of its tip. Users with a high completion rate prefer overdue tips."""
    user = f"user-{chance.randint(1, USERS):04d}"
    candidates: list[dict[str, Any]] = [
        {
            "id": f"tip-{place}",
            "features": {
                "is_overdue": chance.random() < 0.4,
                "task_age_days": round(chance.expovariate(0.1), 2),
                "priority": chance.randrange(4),
            },
        }
        for place in range(chance.randint(4, 7))
    ]
    now = datetime.now(UTC).isoformat()
    asked = {"request_id": request_id, "user_id": user, "candidates": candidates, "context": {"at": now}}
    made = await client.post("/score", json=asked)
    made.raise_for_status()
    decision = made.json()
    profile = (await client.get(f"/profiles/{user}")).json()["features"]
    (chosen,) = [item["features"] for item in candidates if item["id"] == decision["chosen_id"]]
    habit = (profile["completion_rate_30d"] or 0.4) - 0.4
    likes = 0.35 + habit * (1.2 if chosen["is_overdue"] else -0.6) + 0.05 * chosen["priority"]
    action = "completed" if chance.random() < likes else chance.choice(("dismissed", "dismissed", "snoozed"))
    about = {
        "user_id": user,
        "tip_id": decision["chosen_id"],
        "decision_id": decision["decision_id"],
        "occurred_at": datetime.now(UTC).isoformat(),
    }
    return [
        {"subject": "signals.tip.served", "event_id": f"{request_id}-s", **about},
        {"subject": "signals.tip.feedback", "event_id": f"{request_id}-f", "action": action, **about},
    ]


async def main(url: str, *, readme: bool, decisions: int) -> None:
    await decide(url, decisions)
    directory = PICTURES if readme else Path("var/screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    async with chromium() as browser:
        if readme:
            await use(url)
            for name, (template, scheme, height) in IN_READMES.items():
                picture = await shoot(browser, url + PAGES[name], scheme, WIDE, height=height)
                (directory / f"{name}.png").write_bytes(stamped(picture, fingerprint(template)))
            return
        schemes: tuple[Scheme, ...] = ("light", "dark")
        for name, path in PAGES.items():
            for scheme in schemes:
                for width in (WIDE, NARROW):
                    target = directory / f"{name}-{scheme}-{width}.png"
                    target.write_bytes(await shoot(browser, url + path, scheme, width))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--readme", action="store_true", help="only those of the READMEs")
    parser.add_argument("--decisions", type=int, default=0, help="make that many decisions first, with feedback")
    asked = parser.parse_args()
    asyncio.run(main(asked.url, readme=asked.readme, decisions=asked.decisions))
