"""`profiles audit`: compare cached profiles, or the profiles of decisions, with a recomputation."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

import click

from app.cli.common import json_option, print_json, print_rows, progress, say, user_pages, users_argument, with_service

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService

PAGE = 64


@click.command()
@users_argument
@click.option("--repair", is_flag=True, help="Delete wrong values; the next read computes them.")
@click.option(
    "--decisions",
    type=click.IntRange(min=1),
    metavar="N",
    help="Check the profiles that the newest N decisions were made from, instead of the cache.",
)
@json_option
@with_service
async def audit(service: OpenService, users: list[str], repair: bool, decisions: int | None, as_json: bool) -> int:
    """Compare cached profiles with a recomputation.

    Check USERS or, if none are given, every user with an event within the longest window of the features. With
    --decisions, check the profiles of decisions: each value is computed again from the same events.

    Exit code 1 if a wrong value remains in the cache, or if a user could not be checked because the cache does not
    answer or deletions are pending. With --decisions: exit code 1 if the profile of a decision is wrong.
    """
    if decisions is None:
        found = await _audit(service, users, repair)
        failed = len(found["untrue"]) > found["repaired"] or found["users"]["unchecked"]
    elif users or repair:
        raise click.UsageError("--decisions checks stored decisions; it allows neither USERS nor --repair")
    else:
        found = await _audit_decisions(service, decisions)
        failed = found["untrue"]
    (print_json if as_json else print_rows)(found)
    if found["untrue"]:
        say("wrong values were found; please report them", level="warning")
    return 1 if failed else 0


async def _audit(service: OpenService, users: list[str], repair: bool) -> dict[str, Any]:
    from app.profiles.consistency.checker import report

    since_ms = service.clock.now_ms() - service.registry.longest_window_ms()
    counts: Counter[str] = Counter(consistent=0, empty=0, pending=0, violation=0, unchecked=0)
    untrue: list[dict[str, Any]] = []
    repaired = 0
    async for page in user_pages(service, users, since_ms, PAGE, "auditing"):
        results = await service.checker.check(page)
        for result in results:
            counts[result.outcome] += 1
            report(result, service.metrics, after="on demand")
            untrue += [{"user_id": result.user_id, **item} for item in result.wrong]
        if repair:
            repaired += await service.checker.repair(results)
    return {"checked": counts.total(), "users": dict(counts), "untrue": untrue, "repaired": repaired}


async def _audit_decisions(service: OpenService, count: int) -> dict[str, Any]:
    from app.profiles.consistency.decisions import Outcome, report

    decisions, values = (Counter(dict.fromkeys(get_args(Outcome), 0)) for _ in range(2))
    untrue: list[dict[str, Any]] = []
    before = sys.maxsize
    with progress("decisions") as bar:
        task = bar.add_task("auditing", total=count)
        while page := await service.logged_profiles.newest(min(PAGE, count - decisions.total()), before=before):
            for check in await service.decision_checker.check(page):
                decisions[check.outcome] += 1
                values.update(check.values.values())
                report(check, service.metrics)
                untrue += [{"user_id": check.decision.user_id, **item} for item in check.wrong]
            before = page[-1].number
            bar.update(task, completed=decisions.total())
    return {"checked": decisions.total(), "decisions": dict(decisions), "values": dict(values), "untrue": untrue}
