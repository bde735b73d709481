"""`profiles audit`: compare cached profiles with a recomputation."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from app.cli.common import check_user, json_option, print_json, run, say, settings_of_command, user_pages

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.profiles.consistency.checker import CheckResult

PAGE = 64
SHOWN = 20


@click.command()
@click.argument("users", nargs=-1)
@click.option("--repair", is_flag=True, help="Delete wrong values; the next read computes them.")
@json_option
def audit(users: tuple[str, ...], repair: bool, as_json: bool) -> None:
    """Compare cached profiles with a recomputation.

    Check USERS, or else every user with an event within the longest window of the features.

    Exit code 1 if a wrong value remains in the cache, or a user could not be checked because the cache does not answer
    or has yet to execute deletions.
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
    counts: Counter[str] = Counter(consistent=0, empty=0, pending=0, violation=0, unchecked=0)
    untrue: list[dict[str, Any]] = []
    repaired = 0
    async for page in user_pages(service, users, since_ms, PAGE, "auditing"):
        results = await service.checker.check(page)
        for result in results:
            counts[result.outcome] += 1
            untrue += _plain(result)
            report(result, service.metrics, after="on demand")
        if repair:
            repaired += await service.checker.repair(results)
    return {"checked": counts.total(), "users": dict(counts), "untrue": untrue, "repaired": repaired}


def _plain(result: CheckResult) -> list[dict[str, Any]]:
    from app.features.clock import rfc3339

    return [
        {
            "user_id": result.user_id,
            "feature": cell.entry.name,
            "fault": cell.fault,
            "held": cell.held.json.decode(errors="replace"),
            "computed": cell.outcome.json.decode(errors="replace"),
            "held_version": cell.held.version,
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
        f"{found['checked']} users: {users['consistent']} are consistent, {users['empty']} have nothing cached, "
        f"{users['pending']} have an event that is not consumed yet, {users['unchecked']} could not be checked, "
        f"{users['violation']} have wrong values"
    )
    if not found["untrue"]:
        return
    click.echo(f"{len(found['untrue'])} values are wrong; {found['repaired']} of them were deleted. Please report it.")
    for item in found["untrue"][:SHOWN]:
        click.echo(
            f"  {visible(item['user_id'])}: {item['feature']} is {item['fault']}: "
            f"cached {item['held']} (event {item['held_version']}), computed {item['computed']}"
        )
    if len(found["untrue"]) > SHOWN:
        say(f"and {len(found['untrue']) - SHOWN} more; --json lists all", before="  … ")
