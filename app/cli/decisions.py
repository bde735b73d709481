"""`profiles decisions`: export the decision log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from app.cli.common import moment_ms, progress, say, stop_on_sigterm, with_service

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.stores.training_set.columns import Kind

PAGE = 500
# In Parquet the others are text, or JSON as text.
TYPES: dict[Kind, tuple[str, ...]] = {
    "bool": ("explore",),
    "int": ("state_version", "prior_version", "chosen"),
    "float": ("reward",),
    "time": ("decided_at", "profile_read_at", "served_at", "settled_at"),
    "vector": ("champion_scores", "champion_pi", "challenger_scores", "challenger_pi"),
    "matrix": ("phi",),
}


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
    candidate, the profile with the version of each value, the prior's version, state and reward. It is the record of
    GET /decisions. Times have a UTC offset, as in 2026-04-25T08:30:00+02:00.
    """
    from app.bandit.evaluation.records import DecisionRecord
    from app.bandit.ports import EARLIEST_MS, DecisionMoment
    from app.stores.training_set.columns import JsonColumn
    from app.stores.training_set.output import NdjsonWriter, writer_for

    since_ms = moment_ms(since, "--since") if since is not None else EARLIEST_MS
    after: DecisionMoment | None = DecisionMoment(since_ms)
    until_ms = moment_ms(until, "--until") if until is not None else service.clock.now_ms()
    kinds = {name: kind for kind, names in TYPES.items() for name in names}
    path, written = None if str(output) == "-" else output, 0
    encode = msgspec.json.Encoder().encode
    stop_on_sigterm()
    with writer_for(path, NdjsonWriter) as writer, progress("decisions", shown=path is not None) as bar:
        task = bar.add_task("exporting", total=None)
        while after is not None:
            records, after = await service.bandit.decisions.page(after, until_ms, PAGE)
            if records:
                writer.write(
                    {
                        name: JsonColumn([encode(getattr(record, name)) for record in records], kinds.get(name, "text"))
                        for name in DecisionRecord.__struct_fields__
                    }
                )
            written += len(records)
            bar.update(task, completed=written)
    if path is not None:
        say(f"{written} decisions written to {path}")
