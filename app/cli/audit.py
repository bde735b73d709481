"""`profiles audit`: is what the cache holds of everyone the truth?"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from app.cli.look import check_user
from app.cli.output import print_json, progress, run, say, settings_of_command

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.profiles.consistency.checker import CheckResult

PAGE = 64
SHOWN = 20


@click.command()
@click.argument("users", nargs=-1)
@click.option("--repair", is_flag=True, help="Drop what is untrue; the next read computes it.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def audit(users: tuple[str, ...], repair: bool, as_json: bool) -> None:
    """Hold the cached profiles of USERS against a recomputation, or those of every user with an event within the
    longest window of the features.

    Exit code 0 where nothing untrue is left in the cache, 1 where something is or a user could not be checked
    (the cache is away, or deletions are owed to it, so that reads compute).
    """
    for user in users:
        check_user(user)
    found = run(_audit(list(dict.fromkeys(users)), repair))
    if as_json:
        print_json(found)
    else:
        _show(found)
    sys.exit(1 if len(found["untrue"]) > found["repaired"] or found["users"]["unchecked"] else 0)


async def _audit(users: list[str], repair: bool) -> dict[str, Any]:
    from app.bootstrap.service import open_service

    async with open_service(settings_of_command(), door="command") as service:
        return await _walk(service, users, repair)


async def _walk(service: OpenService, users: list[str], repair: bool) -> dict[str, Any]:
    from app.profiles.consistency.checker import report

    since_ms = service.clock.now_ms() - service.registry.longest_window_ms()
    total = len(users) or await service.users.count_eligible(since_ms)
    counts: Counter[str] = Counter(consistent=0, empty=0, pending=0, violation=0, unchecked=0)
    untrue: list[dict[str, Any]] = []
    after, done, repaired = "", 0, 0
    with progress("users") as bar:
        task = bar.add_task("auditing", total=total)
        while page := users[done : done + PAGE] if users else await service.users.eligible(after, since_ms, PAGE):
            results = await service.checker.check(page)
            for result in results:
                counts[result.outcome] += 1
                untrue += _plain(result)
                report(result, service.metrics, after="on demand")
            if repair:
                repaired += await service.checker.repair(results)
            after, done = page[-1], done + len(page)
            bar.update(task, completed=done)
    return {"checked": done, "users": dict(counts), "untrue": untrue, "repaired": repaired}


def _plain(result: CheckResult) -> list[dict[str, Any]]:
    from app.features.clock import rfc3339

    return [
        {
            "user_id": result.user_id,
            "feature": cell.entry.name,
            "fault": cell.fault,
            "held": cell.held.json.decode(errors="replace"),
            "computed": cell.outcome.json.decode(errors="replace"),
            "held_seq": cell.held.seq,
            "newest_events": dict(result.inspection.newest),
            "held_computed_at": rfc3339(cell.held.computed_at_ms),
        }
        for cell in result.untrue
        if cell.held is not None and result.inspection is not None
    ]


def _show(found: dict[str, Any]) -> None:
    from app.features.ids import visible

    users = found["users"]
    click.echo(
        f"{found['checked']} users: {users['consistent']} hold the truth, {users['empty']} have nothing cached, "
        f"{users['pending']} have an event that is not taken in yet, {users['unchecked']} could not be checked, "
        f"{users['violation']} hold something untrue"
    )
    if not found["untrue"]:
        return
    click.echo(f"{len(found['untrue'])} values are untrue, {found['repaired']} of them were dropped. Please report it.")
    for item in found["untrue"][:SHOWN]:
        click.echo(
            f"  {visible(item['user_id'])}: {item['feature']} is {item['fault']}: "
            f"holds {item['held']} (event {item['held_seq']}), computed {item['computed']}"
        )
    if len(found["untrue"]) > SHOWN:
        say(f"and {len(found['untrue']) - SHOWN} more; --json tells of all", before="  … ")
