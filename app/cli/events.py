"""Commands that store events: `profiles events` and `profiles demo`. The service may be running or not."""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from app.cli.common import ACTOR, as_command, complain, fail, progress, say, settings_of_command, show, with_service
from app.cli.demo_set import PREFIX, generate
from app.cli.options import json_option
from app.errors import Conflict, InvalidInput, Issue, Undecodable
from app.features.events import TipEvent
from app.settings import Settings

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.events.ports import Appended

    Ingest = Callable[[Sequence[TipEvent]], Awaitable[Appended]]

LINES_PER_REQUEST = 500
DEMO_CHUNK = 1_000
HEAD_BYTES = 1_000
TOTALS = "{accepted} events stored, {duplicates} duplicates, {refused} refused"


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--skip-bad", is_flag=True, help="Report invalid lines and go on. Default: stop at the first.")
@click.option("--historical", is_flag=True, help="Treat events as known from their event time on, for `--known-at`.")
@json_option
@with_service
async def events(service: OpenService, file: Path, skip_bad: bool, historical: bool, as_json: bool) -> int:
    """Load tip events from FILE.

    FILE is newline-delimited JSON as for POST /events; `-` is standard input. Loading a file twice is safe.

    With --historical, each event of FILE counts as known from the time when it occurred, even if it was stored before.
    This matters for training sets with `--known-at`. Use it for imports. It cannot be undone, and the audit trail
    records it.
    """
    from app.operations.audit import AuditedAction, audited

    entry = (service.audit_trail, service.clock.now_ms(), ACTOR, "load historical events", "")
    async with audited(*entry) if historical else nullcontext(AuditedAction()) as act:
        totals = await _load_file(file, skip_bad, partial(service.ingestor.ingest, historical=historical))
        act.outcome = TOTALS.format(**totals)
    show(totals, as_json, TOTALS.format(**totals))
    return 0 if not totals["refused"] else 1 if skip_bad else 5


async def _load_file(file: Path, skip_bad: bool, ingest: Ingest) -> dict[str, int]:
    from app.events.validation import LINES_EXPECTED, other_format

    totals = {"accepted": 0, "duplicates": 0, "refused": 0}
    with click.open_file(str(file), "rb") as lines:
        head = cast(BufferedReader, lines).peek(HEAD_BYTES).removeprefix(BOM_UTF8)
        if (found := other_format(head)) is not None:
            raise Undecodable(f"{file} is {found}; {LINES_EXPECTED}")
        first = 1
        with progress("loading", "bytes", None if str(file) == "-" else os.fstat(lines.fileno()).st_size) as update:
            while piece := list(islice(lines, LINES_PER_REQUEST)):
                for issue in await _load_lines(ingest, piece, first, skip_bad, totals):
                    complain(issue)
                if totals["refused"] and not skip_bad:
                    say(f"stopped: the first {first - 1} lines are stored")
                    break
                first += len(piece)
                update(advance=sum(map(len, piece)))
    return totals


async def _load_lines(
    ingest: Ingest, lines: list[bytes], first: int, skip_bad: bool, totals: dict[str, int]
) -> Sequence[Issue]:
    """Ingest lines of the file together, and add the counts to `totals`. `first` is the number of the first line.

    If a line is invalid and `skip_bad` is true, each line is ingested alone, and the issues of the invalid ones are
    returned. If `skip_bad` is false, the error is printed and no line is stored.
    """
    import asyncio

    from app.events.validation import decode_lines

    if not any(line.strip() for line in lines):
        return ()
    try:
        receipt = await ingest(decode_lines(b"".join(lines), first))
    except (InvalidInput, Undecodable, Conflict) as error:
        if not skip_bad:
            fail(error)
            totals["refused"] += len({issue.path.partition(".")[0] for issue in error.issues}) or 1
            return ()
        if len(lines) == 1:
            totals["refused"] += 1
            return error.issues or [Issue(f"line {first}", str(error))]
        # Concurrently, so that they share commits.
        alone = (_load_lines(ingest, [line], first + place, skip_bad, totals) for place, line in enumerate(lines))
        return [issue for issues in await asyncio.gather(*alone) for issue in issues]
    totals["accepted"] += receipt.accepted
    totals["duplicates"] += receipt.duplicates
    return ()


@click.command()
@click.option("--users", default=1_000, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("--days", default=90, show_default=True, type=click.IntRange(1, 150))
@click.option("--seed", default=1, show_default=True, type=int, help="The same seed gives the same events on a day.")
@as_command
async def demo(users: int, days: int, seed: int) -> None:
    """Load a demonstration set of users with different habits.

    Loading the set twice on the same day changes nothing. As with `profiles events --historical`, each event counts as
    known from the time when it occurred. This matters for training sets with `--known-at`.
    """
    count = await load_demo(settings_of_command(), users, days, seed)
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
        with progress("generating", "users", users) as update:
            while (chunk := list(islice(made, DEMO_CHUNK))) and not stopped():
                stored += (await service.ingestor.ingest(chunk, historical=True)).accepted
                update(completed=int(chunk[-1].user_id.removeprefix(PREFIX)))
        act.outcome = f"{stored} events stored"
    return stored
