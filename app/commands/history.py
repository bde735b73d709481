"""`profiles history`: a training set, by the same SQL that serves the online read."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from app.commands.look import check_user, moment_ms
from app.commands.output import run, settings_of_command
from app.errors import InvalidInput, Issue, Undecodable

if TYPE_CHECKING:
    from app.assembly import Service
    from app.profiles.ports import Asked
    from app.stores.training_set import TrainingSetWriter

CHUNK = 1_000


class Row(NamedTuple):
    """One row of the input, and the line where it begins."""

    line: int
    user_id: str
    as_of_ms: int


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

    known_for_all = moment_ms(known_at, "--known-at") if known_at not in (None, "as_of") else None
    with writer_for(output) as write:
        count, failed = run(_history(file, known_at == "as_of", known_for_all, write))
    if output is not None:
        click.echo(f"{count} rows written to {output}", err=True)
    for name, reason in failed.items():
        click.echo(f"warning: {name} is null in some rows: {reason}", err=True)
    sys.exit(1 if failed else 0)


async def _history(
    file: Path, known_as_of: bool, known_for_all: int | None, write: TrainingSetWriter
) -> tuple[int, dict[str, str]]:
    """How many rows were written, and why features are null in some of them."""
    from app.assembly import open_service
    from app.features.clock import rfc3339
    from app.profiles.filling import failures

    count, failed = 0, dict[str, str]()
    async with open_service(settings_of_command(), door="command") as service:
        registry = service.contract.registry
        write.begin(registry)
        rows = _rows(file)
        while piece := list(islice(rows, CHUNK)):
            asked = _asked(service, piece, known_as_of, known_for_all)
            profiles = await service.reader.read_as_of(asked)
            failed = failures(registry, profiles) | failed
            for row, readings in zip(piece, profiles, strict=True):
                values = [json.loads(readings[index].json) for index in range(len(registry))]
                write.row([row.user_id, rfc3339(row.as_of_ms), *values])
            count += len(piece)
    return count, failed


def _asked(service: Service, piece: list[Row], known_as_of: bool, known_for_all: int | None) -> list[Asked]:
    from app.profiles.moments import Moments
    from app.profiles.ports import Asked

    registry = service.contract.registry
    moments = Moments(registry, service.settings.retention_days, service.clock)
    asked: list[Asked] = []
    for row in piece:
        known_ms = row.as_of_ms if known_as_of else known_for_all
        if (problem := moments.problem(row.as_of_ms, known_ms, registry.full_mask)) is not None:
            place = f"line {row.line}, as_of" if problem.path == "as_of" else "--known-at"
            raise InvalidInput("a moment is not allowed", [Issue(place, problem.detail)])
        asked.append(Asked(row.user_id, registry.full_mask, row.as_of_ms, known_ms))
    return asked


def _rows(file: Path) -> Iterator[Row]:
    """Raises `Undecodable` or `InvalidInput`, naming the line."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            start = text.read(1)
            text.seek(0)
            for line, item in _objects(text) if start == "{" else _records(text):
                yield _row(line, item)
    except UnicodeDecodeError as error:
        raise Undecodable(f"{file} is not UTF-8 text: {error}") from error


def _row(line: int, item: Any) -> Row:
    user = _text(line, item, "user_id")
    check_user(user, f"line {line}, user_id")
    return Row(line, user, moment_ms(_text(line, item, "as_of"), f"line {line}, as_of"))


def _text(line: int, item: Any, name: str) -> str:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, str) or not value:
        raise InvalidInput("a row is not allowed", [Issue(f"line {line}, {name}", "missing, or not text")])
    return value


def _objects(text: Iterator[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Undecodable("the file cannot be read", [Issue(f"line {number}", f"not JSON: {error}")]) from error


def _records(text: Iterator[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(text)
    try:
        for item in reader:
            # A record ends on the reader's line; one with line breaks in quotes begins above it.
            spans = sum(value.count("\n") for value in item.values() if isinstance(value, str))
            yield reader.line_num - spans, item
    except csv.Error as error:
        issue = Issue(f"line {reader.line_num}", f"not CSV: {error}")
        raise Undecodable("the file cannot be read", [issue]) from error
