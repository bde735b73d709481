"""`profiles profile`: show one user's features."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from app.cli.common import check_user, json_option, moment_ms, out, plain, print_json, with_service
from app.errors import InvalidInput, Issue
from app.features.clock import rfc3339
from app.profiles.ports import ComputeRow

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService


@click.command()
@click.argument("user")
@click.option("--as-of", help="Compute the profile as of this time (RFC 3339), with events up to and including it.")
@json_option
@with_service
async def profile(service: OpenService, user: str, as_of: str | None, as_json: bool) -> None:
    """Show the features of USER with their values, now or at an earlier time."""
    from rich.table import Column, Table

    check_user(user)
    registry = service.registry
    if as_of is None:
        readings = (await service.reader.read({user: registry.full_mask}, patient=True))[user]
    else:
        at_ms = moment_ms(as_of, "--as-of")
        if issue := (await service.moments()).problem(at_ms, registry.full_mask):
            raise InvalidInput("the time is invalid", [Issue("--as-of", issue.detail)])
        (readings,) = await service.reader.read_as_of([ComputeRow(user, registry.full_mask, at_ms)])
    values = {name: json.loads(readings[index].json) for index, name in enumerate(registry.names)}
    if as_json:
        print_json({"user_id": user, "features": values})
        return
    table = Table(*(Column(heading, no_wrap=True) for heading in ("feature", "value", "computed at", "origin")))
    for index, (name, value) in enumerate(values.items()):
        shown = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
        origin = "cache" if readings[index].cached else "computed"
        table.add_row(name, shown, rfc3339(readings[index].computed_at_ms), origin)
    out().print(table)
    for index, name in enumerate(registry.names):
        if (reason := readings[index].error) is not None:
            out().print(f"{name} is null: {plain(reason)}", soft_wrap=True)
