"""`profiles history`: build a training set with the SQL of online reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from app.cli.common import progress, say, with_service
from app.cli.options import check_user, moment_ms
from app.errors import InvalidInput, Issue
from app.features.clock import rfc3339
from app.features.registry import indices
from app.profiles.ports import ComputeRow, LoggedProfiles

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService
    from app.profiles.history import Moments
    from app.profiles.online.cache_protocol import Profile
    from app.profiles.online.reader import ProfileReader
    from app.stores.training_set.input import Block

    KnownAt = int | Literal["as_of"] | None

SAMPLE = 1_000


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="*.csv, *.ndjson or *.parquet. Default: CSV on standard output.",
)
@click.option("--features", multiple=True, metavar="A,B", help="Only these features. May be repeated.")
@click.option("--before", is_flag=True, help="Exclude events at exactly as_of.")
@click.option("--known-at", help="Exclude events that arrived after this time, or after each row's as_of if `as_of`.")
@with_service
async def history(
    service: OpenService, file: Path, output: Path | None, features: tuple[str, ...], before: bool, known_at: str | None
) -> int:
    """Build a training set from the rows of FILE.

    Add to each row the features of its user_id as of its as_of, computed by the SQL of online reads. Events after as_of
    do not count. FILE is CSV, newline-delimited JSON or Parquet; `-` is standard input. The columns of FILE and their
    order are kept.

    If FILE has the column decision_id instead, each row gets the user_id of the decision, an as_of (the time at which
    the decision read the profile) and the values that were read. A feature is computed only if it was not read, or if
    its definition has changed since.

    In Parquet output, as_of is a timestamp. Other columns of Parquet input keep their types. Columns of CSV input are
    text. Columns of JSON input are numbers, booleans or text; mixed and nested values become text.
    """
    from app.profiles.online.cache_protocol import failures
    from app.stores.training_set.columns import KINDS, JsonColumn
    from app.stores.training_set.input import open_rows
    from app.stores.training_set.output import writer_for

    registry, reader, encode = service.registry, service.reader, msgspec.json.encode
    known: KnownAt = None
    if known_at is not None:
        known = "as_of" if known_at == "as_of" else moment_ms(known_at, "--known-at")
    if isinstance(known, int) and (problem := (await service.moments()).future(known, "--known-at")) is not None:
        raise InvalidInput("a time is invalid", [problem])
    mask = registry.mask([name for listed in features for name in listed.split(",")] or None)
    chosen = {index: registry[index] for index in indices(mask)}
    late = _LateArrivals({index: encode(item.default) for index, item in chosen.items()})
    failed: dict[str, str] = {}
    with (
        open_rows(file) as rows,
        writer_for(output) as writer,
        progress("computing", "rows", shown=output is not None) as update,
    ):
        by_decision = _check_columns(rows.names, [item.name for item in chosen.values()], before, known)
        for block in rows.blocks:
            moments = await service.moments()
            if by_decision:
                wanted = await _served(block, mask, moments, service.logged_profiles)
            else:
                wanted = [({}, row) for row in _asked(block, mask, before, known, moments)]
            asked = [row for _, row in wanted]
            rest = await reader.read_as_of(asked)
            profiles = [served | others for (served, _), others in zip(wanted, rest, strict=True)]
            failed = failures(registry, profiles) | failed
            late.note(asked, profiles)
            columns = dict(block.columns)
            if by_decision:
                columns["user_id"] = JsonColumn([encode(row.user_id) for row in asked], "text")
                columns["as_of"] = JsonColumn([encode(rfc3339(row.now_ms or 0)) for row in asked], "text")
            for index, item in chosen.items():
                columns[item.name] = JsonColumn([profile[index].json for profile in profiles], KINDS[item.dtype])
            writer.write(columns)
            update(completed=late.rows)
    if output is not None:
        say(f"{late.rows} rows written to {output}")
    for name, reason in failed.items():
        say(f"{name} is null in some rows: {reason}", level="warning", before="warning: ")
    if (share := await late.share(reader)) > 0.5:
        say(
            f"{share:.0%} of the rows have no values because every event up to their as_of arrived too late for "
            "--known-at; load imported events with `profiles events --historical`, or omit --known-at",
            level="warning",
            before="warning: ",
        )
    return 1 if failed else 0


def _check_columns(columns: Sequence[str], features: Iterable[str], before: bool, known: KnownAt) -> bool:
    """Whether the input has a column `decision_id`. Raises `InvalidInput` if any column has the name of a feature, or
    if there is a `decision_id` and `before` or `known` is set: these do not apply to decisions."""
    from app.stores.training_set.input import DECISION_KEY

    by_decision = DECISION_KEY in columns
    if by_decision and (before or known is not None):
        name = "--before" if before else "--known-at"
        raise InvalidInput("an option is not allowed", [Issue(name, "has no meaning for rows with decision_id")])
    if issues := [Issue(name, "is also a feature; rename the column") for name in features if name in columns]:
        raise InvalidInput("columns of the input have the names of features", issues)
    return by_decision


def _asked(block: Block, mask: int, before: bool, known: KnownAt, moments: Moments) -> list[ComputeRow]:
    """Convert a block of input rows to computations of the features in `mask`. An invalid row raises `InvalidInput`."""
    asked: list[ComputeRow] = []
    for number, user, at in zip(block.numbers, block.keys["user_id"], block.keys["as_of"], strict=True):
        place = f"{block.place} {number}"
        if user is None or at is None:
            missing = "user_id" if user is None else "as_of"
            raise InvalidInput("a row is invalid", [Issue(f"{place}, {missing}", "is missing or not text")])
        check_user(user, f"{place}, user_id")
        at_ms = (moment_ms(at, f"{place}, as_of") if isinstance(at, str) else at) - before
        if (problem := moments.problem(at_ms, mask, f"{place}, as_of")) is not None:
            raise InvalidInput("a time is invalid", [problem])
        asked.append(ComputeRow(user, mask, at_ms, at_ms if known == "as_of" else known))
    return asked


async def _served(
    block: Block, mask: int, moments: Moments, decisions: LoggedProfiles
) -> list[tuple[Profile, ComputeRow]]:
    """Return for each input row the values that were read for its decision, and a computation of the other features in
    `mask`; see `served_row`. Raises `InvalidInput` if a decision cannot be used."""
    from app.profiles.history import served_row

    ids = block.keys["decision_id"]
    found = await decisions.by_id([decision_id for decision_id in ids if decision_id is not None])
    rows: list[tuple[Profile, ComputeRow]] = []
    for number, decision_id in zip(block.numbers, ids, strict=True):
        place = f"{block.place} {number}, decision_id"
        if decision_id is None:
            raise InvalidInput("a row is invalid", [Issue(place, "is missing or not text")])
        rows.append(served_row(found.get(decision_id), place, moments, mask))
    return rows


class _LateArrivals(msgspec.Struct):
    """Estimates the share of *late* rows: rows without values only because their events arrived after `--known-at`.
    To find out, it computes a sample of the rows without values again, as if all events had arrived in time."""

    defaults: Mapping[int, bytes]
    rows: int = 0
    _empty: int = 0
    _sample: list[ComputeRow] = msgspec.field(default_factory=list)
    _random: Random = msgspec.field(default_factory=lambda: Random(1))  # noqa: S311  # a sample, not a secret

    def note(self, asked: Sequence[ComputeRow], profiles: Sequence[Profile]) -> None:
        self.rows += len(asked)
        for row, profile in zip(asked, profiles, strict=True):
            if row.known_ms is None or not self._is_empty(profile):
                continue
            self._empty += 1
            if len(self._sample) < SAMPLE:
                self._sample.append(row)
            elif (place := self._random.randrange(self._empty)) < SAMPLE:
                self._sample[place] = row

    async def share(self, reader: ProfileReader) -> float:
        """Estimate the share of late rows among all rows. If at least half of the rows have values, the share
        is too small for a warning: return 0 without an estimate."""
        if self._empty * 2 <= self.rows:
            return 0.0
        profiles = await reader.read_as_of([row._replace(known_ms=None) for row in self._sample])
        late = sum(not self._is_empty(profile) for profile in profiles)
        return late / len(profiles) * self._empty / self.rows

    def _is_empty(self, profile: Profile) -> bool:
        return all(profile[index].json == default for index, default in self.defaults.items())
