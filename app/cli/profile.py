"""`profiles profile`: show one user's features."""

from __future__ import annotations

import json
from typing import Any

import click

from app.cli.common import check_user, json_option, moment_ms, out, plain, print_json, run, settings_of_command
from app.errors import InvalidInput, Issue
from app.features.clock import rfc3339


@click.command()
@click.argument("user")
@click.option("--as-of", help="Compute the profile as of this time (RFC 3339), with events up to and including it.")
@json_option
def profile(user: str, as_of: str | None, as_json: bool) -> None:
    """Show the profile of USER."""
    from rich.table import Column, Table

    from app.features.registry import indices

    check_user(user)
    readings, registry = run(_read(user, moment_ms(as_of, "--as-of") if as_of else None))
    values = {registry.names[index]: json.loads(readings[index].json) for index in indices(registry.full_mask)}
    if as_json:
        print_json({"user_id": user, "features": values})
        return
    table = Table(*(Column(heading, no_wrap=True) for heading in ("feature", "value", "computed at", "origin")))
    for index, entry in enumerate(registry):
        reading = readings[index]
        origin = "cache" if reading.cached else "computed"
        table.add_row(entry.name, shown(values[entry.name]), rfc3339(reading.computed_at_ms), origin)
    out().print(table)
    for index, entry in enumerate(registry):
        if (reason := readings[index].error) is not None:
            out().print(f"{entry.name} is null: {plain(reason)}", soft_wrap=True)


def shown(value: object) -> str:
    """A feature value as JSON, with floats rounded to six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


async def _read(user: str, as_of_ms: int | None) -> tuple[dict[int, Any], Any]:
    from app.bootstrap.service import open_service
    from app.profiles.history.validation import Moments
    from app.profiles.ports import ComputeRow

    async with open_service(settings_of_command(), door="command") as service:
        registry = service.registry
        if as_of_ms is None:
            return (await service.reader.read({user: registry.full_mask}, patient=True))[user], registry
        problem = Moments(registry, service.settings.retention_days, service.clock).problem
        if issue := problem(as_of_ms, None, registry.full_mask):
            raise InvalidInput("the time is invalid", [Issue("--as-of", issue.detail)])
        (readings,) = await service.reader.read_as_of([ComputeRow(user, registry.full_mask, as_of_ms)])
        return readings, registry
