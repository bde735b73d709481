"""Commands that look: features, one profile, a training set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from app.commands.output import out, print_json, run, settings_of_command
from app.errors import InvalidInput, Issue, Undecodable

CHUNK = 1_000


@click.command()
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["table", "json", "json-schema", "python", "typescript"]),
    default="table",
    help="json-schema, python and typescript export the contract for consumers.",
)
def features(fmt: str) -> None:
    """List the features, or export their contract."""
    from rich.table import Table

    from app.features.definitions import REGISTRY
    from app.features.export import FORMATS
    from app.features.schema import ProfileFeatures

    if fmt in FORMATS:
        click.echo(FORMATS[fmt](REGISTRY, ProfileFeatures), nl=False)
        return
    if fmt == "json":
        rows = [
            {
                "name": entry.name,
                "dtype": entry.dtype,
                "ttl_s": entry.ttl.total_seconds(),
                "default": entry.default,
                "description": entry.description,
                "invalidated_by": list(entry.invalidated_by),
                "fingerprint": entry.fingerprint,
            }
            for entry in REGISTRY
        ]
        print_json({"features": rows})
        return
    table = Table("name", "dtype", "TTL", "default", "invalidated by", "description")
    for entry in REGISTRY:
        table.add_row(
            entry.name,
            entry.dtype,
            str(entry.ttl),
            json.dumps(entry.default),
            ", ".join(entry.invalidated_by),
            entry.description,
        )
    out.print(table)


@click.command()
@click.argument("user")
@click.option("--as-of", help="As of this time (RFC 3339), computed and not cached.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def profile(user: str, as_of: str | None, as_json: bool) -> None:
    """Show the profile of USER."""
    from rich.table import Table

    from app.features.clock import rfc3339
    from app.features.registry import indices

    check_user(user)
    readings, registry = run(_read(user, _moment(as_of, "--as-of") if as_of else None))
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
    out.print(table)


def shown(value: object) -> str:
    """A value for people: floats to six digits."""
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


async def _read(user: str, as_of_ms: int | None) -> tuple[dict[int, Any], Any]:
    from app.assembly import open_service
    from app.profiles.ports import Asked

    async with open_service(settings_of_command(), door="command") as service:
        registry = service.contract.registry
        if as_of_ms is None:
            return (await service.reader.read({user: registry.full_mask}))[user], registry
        (readings,) = await service.reader.read_as_of([Asked(user, registry.full_mask, as_of_ms)])
        return readings, registry


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="*.csv or *.parquet; standard output: CSV."
)
@click.option("--known-at", help="Leave out events that arrived after this time; `as_of`: after each row's moment.")
def history(file: Path, output: Path | None, known_at: str | None) -> None:
    """Build a training set: each row of FILE (CSV with user_id,as_of, or one JSON object a line) gets its features.

    The same SQL serves it as the online read, and no row sees anything later than its own moment.
    """
    from app.stores.training_set import writer_for

    with writer_for(output) as write:
        count = run(_history(file, known_at, write))
    if output is not None:
        click.echo(f"{count} rows written to {output}", err=True)


async def _history(file: Path, known_at: str | None, write: Any) -> int:
    from app.assembly import open_service
    from app.features.clock import rfc3339
    from app.profiles.ports import Asked

    known_for_all = _moment(known_at, "--known-at") if known_at not in (None, "as_of") else None
    count = 0
    async with open_service(settings_of_command(), door="command") as service:
        registry = service.contract.registry
        write.begin(registry)
        for piece in _pieces(_rows(file)):
            asked = [
                Asked(user, registry.full_mask, moment, moment if known_at == "as_of" else known_for_all)
                for user, moment in piece
            ]
            for row, readings in zip(asked, await service.reader.read_as_of(asked), strict=True):
                values = [json.loads(readings[index].json) for index in range(len(registry))]
                write.row([row.user_id, rfc3339(row.now_ms or 0), *values])
            count += len(piece)
    return count


def _pieces(rows: Iterator[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    from itertools import islice

    while piece := list(islice(rows, CHUNK)):
        yield piece


def _rows(file: Path) -> Iterator[tuple[str, int]]:
    with file.open(encoding="utf-8", newline="") as lines:
        start = lines.read(1)
        lines.seek(0)
        items: Iterator[Any] = map(_object, lines) if start == "{" else iter(csv.DictReader(lines))
        first = 1 if start == "{" else 2
        try:
            for number, item in enumerate(items, start=first):
                if not isinstance(item, dict) or not item.get("user_id") or not item.get("as_of"):
                    raise InvalidInput("a row lacks its user or moment", [Issue(f"line {number}", "user_id, as_of")])
                check_user(str(item["user_id"]))
                yield str(item["user_id"]), _moment(str(item["as_of"]), f"line {number}, as_of")
        except (UnicodeDecodeError, csv.Error) as error:
            raise Undecodable(f"{file} is not UTF-8 text: {error}") from error


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise Undecodable(f"not JSON: {error}") from error


def check_user(user: str) -> None:
    """Raise `InvalidInput` where the id is not allowed."""
    from app.features.ids import id_problem

    if (problem := id_problem(user)) is not None:
        raise InvalidInput("the user id is not allowed", [Issue("user_id", problem)])


def _moment(text: str, place: str) -> int:
    from datetime import datetime

    from app.features.clock import to_ms

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidInput(f"{place}: {text!r} is no time; write 2026-04-25T08:30:00+02:00") from error
    if moment.tzinfo is None:
        raise InvalidInput(f"{place}: {text!r} lacks its UTC offset; write 2026-04-25T08:30:00+02:00")
    return to_ms(moment)
