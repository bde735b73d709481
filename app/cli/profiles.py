"""Commands about cached profiles: `profiles profile` shows one, `rebuild` computes them, and `audit` checks them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, get_args

import click

from app.cli.common import out, plain, progress, say, show, with_service
from app.cli.options import check_user, json_option, registry_option, time_option, users_argument
from app.errors import CacheUnavailable, InvalidInput
from app.features.clock import rfc3339
from app.profiles.ports import ComputeRow

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService

AUDITED_AT_ONCE = 64
REBUILT_AT_ONCE = 128


@click.command()
@click.argument("user")
@time_option("--as-of", "as_of_ms", help="Compute the profile as of this time, with events up to and including it.")
@json_option
@with_service
async def profile(service: OpenService, user: str, as_of_ms: int | None, as_json: bool) -> None:
    """Show the features of USER with their values, now or at an earlier time."""
    from rich.table import Column, Table

    check_user(user)
    registry = service.registry
    if as_of_ms is None:
        found = (await service.reader.read({user: registry.full_mask}, patient=True))[user]
    else:
        if issue := (await service.moments()).problem(as_of_ms, registry.full_mask, "--as-of"):
            raise InvalidInput("the time is invalid", [issue])
        (found,) = await service.reader.read_as_of([ComputeRow(user, registry.full_mask, as_of_ms)])
    values = {name: json.loads(found[index].json) for index, name in enumerate(registry.names)}
    if as_json:
        show({"user_id": user, "features": values}, as_json)
        return
    table = Table(*(Column(heading, no_wrap=True) for heading in ("feature", "value", "computed at", "origin")))
    for index, (name, value) in enumerate(values.items()):
        shown = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
        origin = "cache" if found[index].cached else "computed"
        table.add_row(name, shown, rfc3339(found[index].computed_at_ms), origin)
    out().print(table)
    for index, name in enumerate(registry.names):
        if (reason := found[index].error) is not None:
            out().print(f"{name} is null: {plain(reason)}", soft_wrap=True)


@click.command()
@users_argument
@click.option(
    "--all", "all_users", is_flag=True, help="Every user with an event within the longest window of the features."
)
@click.option("--feature", "features", multiple=True, help="Rebuild only this feature. May be repeated.")
@registry_option
@click.option(
    "--rate", default=500, show_default=True, type=click.IntRange(0, 1_000_000), help="Users per second; 0: no limit."
)
@json_option
@with_service
async def rebuild(
    service: OpenService, users: list[str], all_users: bool, features: tuple[str, ...], rate: int, as_json: bool
) -> int:
    """Compute and cache features now, for USERS or, with --all, for all users.

    To fill a new feature before a release that serves it, name its registry: `profiles rebuild --all --feature NAME
    --registry new.py:REGISTRY`. New events invalidate its values, although no process serves it yet. If processes serve
    another definition under the same name, they overwrite its values; choose a new name to avoid that.

    Exit code 1 if a value could not be computed.
    """
    import asyncio

    from app.profiles.online.cache_protocol import failures

    if bool(users) == all_users:
        raise click.UsageError("give either USERS or --all")
    mask = service.registry.mask(features or None)
    failed: dict[str, str] = {}
    done, started = 0, service.clock.monotonic()
    try:
        await service.invalidator.settle()  # owed invalidations would delete the rebuilt values later
        async for page in _pages(service, users, mask, min(REBUILT_AT_ONCE, rate or REBUILT_AT_ONCE), "rebuilding"):
            if rate:
                await asyncio.sleep(started + done / rate - service.clock.monotonic())
            await service.cache.check()  # fail instead of computing values that cannot be stored
            profiles = await service.rebuilder.rebuild(page, mask)
            failed |= failures(service.registry, profiles.values())
            done += len(page)
    except CacheUnavailable as error:
        raise CacheUnavailable(f"the cache cannot be used: {error}; `profiles doctor` examines it") from error
    finally:
        await service.clear_local_caches()
    lines = [f"{done} users rebuilt", *(f"  {name} failed: {reason}" for name, reason in failed.items())]
    show({"rebuilt": done, "failed": failed}, as_json, *lines)
    return 1 if failed else 0


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
        found = await _audit_cache(service, users, repair)
        failed = len(found["untrue"]) > found["repaired"] or found["users"]["unchecked"]
    elif users or repair:
        raise click.UsageError("--decisions checks stored decisions; it allows neither USERS nor --repair")
    else:
        found = await _audit_decisions(service, decisions)
        failed = found["untrue"]
    show(found, as_json)
    if found["untrue"]:
        say("wrong values were found; please report them", level="warning")
    return 1 if failed else 0


async def _audit_cache(service: OpenService, users: list[str], repair: bool) -> dict[str, Any]:
    from app.profiles.consistency.checker import report

    counts: Counter[str] = Counter(consistent=0, empty=0, pending=0, violation=0, unchecked=0)
    untrue: list[dict[str, Any]] = []
    repaired = 0
    async for page in _pages(service, users, service.registry.full_mask, AUDITED_AT_ONCE, "auditing"):
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
    before, left = sys.maxsize, count
    with progress("auditing", "decisions", count) as update:
        while page := await service.logged_profiles.newest(min(AUDITED_AT_ONCE, left), before=before):
            for check in await service.decision_checker.check(page):
                decisions[check.outcome] += 1
                values.update(check.values.values())
                report(check, service.metrics)
                untrue += [{"user_id": check.decision.user_id, **item} for item in check.wrong]
            before, left = page[-1].number, count - decisions.total()
            update(completed=decisions.total())
    return {"checked": decisions.total(), "decisions": dict(decisions), "values": dict(values), "untrue": untrue}


async def _pages(service: OpenService, users: list[str], mask: int, size: int, action: str) -> AsyncIterator[list[str]]:
    """Yield `users` in pages of `size`; if there are none, every user with an event within the longest window of the
    features in the mask. Show a progress bar, which is labelled `action`."""
    since_ms = service.clock.now_ms() - service.registry.longest_window_ms(mask)
    total = len(users) or await service.users.count_eligible(since_ms)
    after, done = "", 0
    with progress(action, "users", total) as update:
        while page := users[done : done + size] if users else await service.users.eligible(after, since_ms, size):
            yield page
            after, done = page[-1], done + len(page)
            update(completed=done, total=max(total, done))
