"""`profiles decisions`: export the decision log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click
import msgspec

from app.cli.common import moment_ms, progress, say, stop_on_sigterm, with_service
from app.errors import InvalidInput, Issue

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.stores.training_set.columns import Kind

PAGE = 500


@click.group()
def decisions() -> None:
    """Export the decision log."""


@decisions.command()
@click.option("--since", metavar="TIME", help="Only decisions made at or after this time. Default: all.")
@click.option("--until", metavar="TIME", help="Only decisions made before this time. Default: now.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    help="*.parquet, *.ndjson or *.csv; `-` is NDJSON on standard output.",
)
@with_service
async def export(service: OpenService, since: str | None, until: str | None, output: Path) -> None:
    """Write each decision with all that it was made from and its outcome, oldest first.

    A record has the candidates, their input vectors phi, the scores and propensities of both policies, the chosen
    candidate, the context, the profile with the version of each value, the prior's version, state and reward. It is the
    record of GET /decisions. Times have a UTC offset, as in 2026-04-25T08:30:00+02:00.
    """
    from app.bandit.ports import EARLIEST_MS, DecisionMoment
    from app.stores.training_set.columns import JsonColumn
    from app.stores.training_set.output import NdjsonWriter, writer_for

    since_ms = moment_ms(since, "--since") if since is not None else EARLIEST_MS
    after: DecisionMoment | None = DecisionMoment(since_ms)
    until_ms = moment_ms(until, "--until") if until is not None else service.clock.now_ms()
    path, written = None if str(output) == "-" else output, 0
    encode, kinds = msgspec.json.Encoder().encode, _kinds()
    stop_on_sigterm()
    if since_ms > until_ms:
        raise InvalidInput("the period is invalid", [Issue("--since", "must not be later than --until (default: now)")])
    with writer_for(path, NdjsonWriter) as writer, progress("decisions", shown=path is not None) as bar:
        task = bar.add_task("exporting", total=None)
        while after is not None:
            records, after = await service.bandit.decisions.page(after, until_ms, PAGE)
            writer.write(  # without records, too: the file then has the columns, and Parquet is not Parquet without
                {
                    name: JsonColumn([encode(getattr(record, name)) for record in records], kind)
                    for name, kind in kinds.items()
                }
            )
            written += len(records)
            bar.update(task, completed=written)
    if path is not None:
        say(f"{written} decisions written to {path}")


def _kinds() -> dict[str, Kind]:
    """The kind of each column, by name, from the type of the record's field. What has no kind of its own is text, or
    JSON as text."""
    from app.bandit.decisions import DecisionRecord, Time

    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", Time: "time"}
    kinds |= {list[float]: "vector", list[list[float]]: "matrix"}
    kinds |= {kind | None: name for kind, name in kinds.items()}
    return {name: kinds.get(kind, "text") for name, kind in get_type_hints(DecisionRecord).items()}
