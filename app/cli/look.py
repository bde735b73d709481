"""`profiles profile`: one user's features. And what commands share that take a user or a moment."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from app.cli.output import out, plain, print_json, run, settings_of_command
from app.errors import InvalidInput, Issue
from app.features.clock import rfc3339, to_ms


@click.command()
@click.argument("user")
@click.option("--as-of", help="As of this time (RFC 3339), its own events included; computed and not cached.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def profile(user: str, as_of: str | None, as_json: bool) -> None:
    """Show the profile of USER."""
    from rich.table import Table

    from app.features.registry import indices

    check_user(user)
    readings, registry = run(_read(user, moment_ms(as_of, "--as-of") if as_of else None))
    values = {registry.names[index]: json.loads(readings[index].json) for index in indices(registry.full_mask)}
    if as_json:
        print_json({"user_id": user, "features": values})
        return
    table = Table()
    for heading in ("feature", "value", "computed at", "origin"):
        table.add_column(heading, no_wrap=True)
    for index, entry in enumerate(registry):
        reading = readings[index]
        origin = "cache" if reading.cached else "computed"
        table.add_row(entry.name, shown(values[entry.name]), rfc3339(reading.computed_at_ms), origin)
    out().print(table)
    for index, entry in enumerate(registry):
        if (reason := readings[index].error) is not None:
            out().print(f"{entry.name} is null: {plain(reason)}", soft_wrap=True)


def shown(value: object) -> str:
    """A value for people: floats to six digits."""
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
            raise InvalidInput("the moment is not allowed", [Issue("--as-of", issue.detail)])
        (readings,) = await service.reader.read_as_of([ComputeRow(user, registry.full_mask, as_of_ms)])
        return readings, registry


def check_user(user: str, place: str = "user_id") -> None:
    """Raise `InvalidInput` where the id is not allowed."""
    from app.features.ids import id_problem

    if (problem := id_problem(user)) is not None:
        raise InvalidInput("the user id is not allowed", [Issue(place, problem)])


def moment_ms(text: str, place: str) -> int:
    """A time with its UTC offset, in milliseconds; raises `InvalidInput`, naming the place."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        reason = "lacks its UTC offset" if moment is not None else "is no time"
        raise InvalidInput(
            "a time is not allowed", [Issue(place, f"{text!r} {reason}; write 2026-04-25T08:30:00+02:00")]
        )
    return to_ms(moment)
