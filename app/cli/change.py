"""Commands that change data: rebuild, events, demo, prune. The service may be running or not."""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from app.cli.common import (
    ACTOR,
    complain,
    fail,
    json_option,
    print_json,
    progress,
    registry_option,
    run,
    say,
    settings_of_command,
    user_pages,
    users_argument,
    with_service,
)
from app.cli.demo_set import PREFIX, generate
from app.errors import CacheUnavailable, Conflict, InvalidInput, Issue, ProfilesError, Undecodable
from app.features.events import TipEvent
from app.settings import Settings

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.events.ports import Appended

    Ingest = Callable[[Sequence[TipEvent]], Awaitable[Appended]]

LINES_PER_REQUEST = 500
REBUILD_CHUNK = 128
DEMO_CHUNK = 1_000
HEAD_BYTES = 1_000
TOTALS = "{accepted} events stored, {duplicates} duplicates, {refused} refused"
INVALID = (InvalidInput, Undecodable, Conflict)


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
    --registry new.py:REGISTRY`. Running processes already invalidate its values. If they serve a feature of that name
    with another definition, they also overwrite its values; choose a new name to avoid that.

    Exit code 1 if a value could not be computed.
    """
    import asyncio

    from app.profiles.online.cache_protocol import failures

    if bool(users) == all_users:
        raise click.UsageError("give either USERS or --all")
    registry = service.registry
    mask = registry.mask(features or None)
    since_ms = service.clock.now_ms() - registry.longest_window_ms(mask)
    chunk = min(REBUILD_CHUNK, rate or REBUILD_CHUNK)
    failed: dict[str, str] = {}
    done, started = 0, service.clock.monotonic()
    try:
        await service.invalidator.settle()  # owed invalidations would delete the rebuilt values later
        async for page in user_pages(service, users, since_ms, chunk, "rebuilding"):
            if rate:
                await asyncio.sleep(started + done / rate - service.clock.monotonic())
            await service.cache.check()  # fail instead of computing values that cannot be stored
            profiles = await service.rebuilder.rebuild(page, mask)
            failed |= failures(registry, profiles.values())
            done += len(page)
    except CacheUnavailable as error:
        raise CacheUnavailable(f"the cache cannot be used: {error}; `profiles doctor` examines it") from error
    finally:
        await service.clear_local_caches()
    if as_json:
        print_json({"rebuilt": done, "failed": failed})
    else:
        click.echo(f"{done} users rebuilt")
        for name, reason in failed.items():
            click.echo(f"  {name} failed: {reason}")
    return 1 if failed else 0


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--skip-bad", is_flag=True, help="Report invalid lines and go on. Default: stop at the first.")
@click.option("--historical", is_flag=True, help="Treat events as known from their event time on, for `--known-at`.")
@json_option
@with_service
async def events(service: OpenService, file: Path, skip_bad: bool, historical: bool, as_json: bool) -> int:
    """Load tip events from FILE.

    FILE is newline-delimited JSON as for POST /events; `-` is standard input. Loading a file twice is safe.

    With --historical, a training set with `--known-at` treats the events of FILE as if they had arrived when they
    occurred, also those that are stored already. Use it for imports. It cannot be undone, and the audit trail records
    it.
    """
    from app.operations.audit import audited

    async with AsyncExitStack() as stack:
        act = None
        if historical:
            entry = (service.audit_trail, service.clock.now_ms(), ACTOR, "load historical events", "")
            act = await stack.enter_async_context(audited(*entry))
        totals = await _load_file(file, skip_bad, partial(service.ingestor.ingest, historical=historical))
        if act is not None:
            act.outcome = TOTALS.format(**totals)
    if as_json:
        print_json(totals)
    else:
        click.echo(TOTALS.format(**totals))
    return 0 if not totals["refused"] else 1 if skip_bad else 5


async def _load_file(file: Path, skip_bad: bool, ingest: Ingest) -> dict[str, int]:
    from app.events.validation import LINES_EXPECTED, other_format

    totals = {"accepted": 0, "duplicates": 0, "refused": 0}
    with click.open_file(str(file), "rb") as lines, progress("bytes") as bar:
        task = bar.add_task("loading", total=None if str(file) == "-" else os.fstat(lines.fileno()).st_size)
        first = 1
        head = cast(BufferedReader, lines).peek(HEAD_BYTES).removeprefix(BOM_UTF8)
        if (found := other_format(head)) is not None:
            raise Undecodable(f"{file} is {found}; {LINES_EXPECTED}")
        while piece := list(islice(lines, LINES_PER_REQUEST)):
            await _load_piece(ingest, piece, first, skip_bad, totals)
            if totals["refused"] and not skip_bad:
                say(f"stopped: the first {first - 1} lines are stored")
                break
            first += len(piece)
            bar.advance(task, sum(map(len, piece)))
    return totals


async def _load_piece(ingest: Ingest, piece: list[bytes], first: int, skip_bad: bool, totals: dict[str, int]) -> None:
    """Ingest the lines of a piece of the file together, and add the counts to `totals`.

    `first` is the line number of the first line. If a line is invalid and `skip_bad` is true, each line is ingested
    alone, and the invalid ones are printed. If `skip_bad` is false, the error is printed and no line of the piece is
    stored.
    """
    import asyncio

    from app.events.validation import decode_lines

    async def load(number: int, line: bytes) -> Appended | ProfilesError:
        try:
            return await ingest(decode_lines(line, number))
        except INVALID as error:
            return error

    lines = [(number, line) for number, line in enumerate(piece, start=first) if line.strip()]
    outcomes = [await load(first, b"".join(piece))] if lines else []
    if skip_bad and any(isinstance(outcome, ProfilesError) for outcome in outcomes):
        # Concurrently, so that they share commits.
        outcomes = await asyncio.gather(*(load(number, line) for number, line in lines))
    for (number, _), outcome in zip(lines, outcomes, strict=False):
        if not isinstance(outcome, ProfilesError):
            totals["accepted"] += outcome.accepted
            totals["duplicates"] += outcome.duplicates
        elif skip_bad:
            totals["refused"] += 1
            for issue in outcome.issues or [Issue(f"line {number}", str(outcome))]:
                complain(issue)
        else:
            fail(outcome)
            totals["refused"] += len({issue.path.partition(".")[0] for issue in outcome.issues}) or 1


@click.command()
@click.option("--users", default=1_000, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("--days", default=90, show_default=True, type=click.IntRange(1, 150))
@click.option("--seed", default=1, show_default=True, type=int, help="The same seed gives the same events on a day.")
def demo(users: int, days: int, seed: int) -> None:
    """Load a demonstration set of users with different habits.

    Loading the set twice on the same day changes nothing. As with `profiles events --historical`, a training set with
    `--known-at` treats the events as if they had arrived when they occurred.
    """
    count = run(load_demo(settings_of_command(), users, days, seed))
    click.echo(f"{count} events stored for {users} users over {days} days")


async def load_demo(
    settings: Settings, users: int, days: int, seed: int, stopped: Callable[[], bool] = lambda: False
) -> int:
    """Store the demonstration set; stop early once `stopped` returns true. Return the number of new events."""
    from app.bootstrap.service import open_service
    from app.operations.audit import audited

    stored = 0
    async with (
        open_service(settings, door="command") as service,
        audited(service.audit_trail, service.clock.now_ms(), ACTOR, "load the demonstration set", "") as act,
    ):
        made = generate(users=users, days=days, seed=seed, now_ms=service.clock.now_ms())
        with progress("users") as bar:
            task = bar.add_task("generating", total=users)
            while (chunk := list(islice(made, DEMO_CHUNK))) and not stopped():
                stored += (await service.ingestor.ingest(chunk, historical=True)).accepted
                bar.update(task, completed=int(chunk[-1].user_id.removeprefix(PREFIX)))
        act.outcome = f"{stored} events stored"
    return stored


@click.command()
@click.option("--confirm", is_flag=True, help="Delete everything older than the retention, however much it is.")
@with_service
async def prune(service: OpenService, confirm: bool) -> int:
    """Delete events and decisions that are older than the retention.

    A worker prunes every night. Each run deletes at most three days more than the run before, so that a wrong clock
    cannot delete more. If a first run would delete more than three days, nothing is deleted without --confirm, and the
    exit code is 1.
    """
    import asyncio

    from app.operations.audit import audited

    action = "prune everything too old" if confirm else "prune"
    async with audited(service.audit_trail, service.clock.now_ms(), ACTOR, action, "") as act:
        cutoffs = await service.retention.next_cutoffs(confirmed=confirm)
        gone = await service.retention.prune(cutoffs, asyncio.sleep) or {}
        lines = [f"{count:,} {what}" for what, count in gone.items()]
        act.outcome = ", ".join(lines) or "nothing"
    for line in lines:
        click.echo(f"{line} deleted")
    if waiting := [what for what in ("events", "decisions") if what not in gone]:
        click.echo(f"{' and '.join(waiting)} not deleted: more than three days; check the clock, then use --confirm")
    return 1 if waiting else 0
