"""Reads the rows of a training set: CSV, NDJSON or Parquet, recognised by the first bytes. A pipe is first copied into
an unnamed temporary file: Parquet has its metadata at the end, and the columns of NDJSON are known only at the end."""

import csv
import shutil
import sys
import tempfile
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from app.errors import InvalidInput, Issue, StoreUnavailable, Undecodable
from app.events.validation import TABLE, other_format
from app.stores.training_set.columns import NULL, ArrowColumn, Column, JsonColumn, Kind, pyarrow

# The columns that say what a row asks for: a user and a moment, or a decision.
MOMENT_KEYS = ("user_id", "as_of")
DECISION_KEY = "decision_id"
BLOCK = 128
HEAD_BYTES = 1_000
EXPECTED = (
    "expected is CSV in UTF-8, newline-delimited JSON (one row a line) or Parquet, with user_id and as_of, or with "
    "decision_id"
)
_KINDS: dict[type, Kind] = {str: "text", bool: "bool", int: "int", float: "float", list: "text", dict: "text"}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Block(NamedTuple):
    """Consecutive rows of a training set, stored by column. `numbers` has the number of each row in the file, for error
    messages. `place` says whether these count lines ("line") or rows ("row"). `keys` has the values of the columns
    `user_id` and `as_of`, or of `decision_id`; None means missing or not text. An `as_of` is the text in the file or,
    if Parquet has times with a time zone, milliseconds since 1970."""

    place: str
    numbers: Sequence[int]
    keys: Mapping[str, Sequence[Any]]
    columns: dict[str, Column]


class Rows(NamedTuple):
    """A training set that is being read: the names of its columns in order, and its rows in blocks."""

    names: Sequence[str]
    blocks: Iterator[Block]


@contextmanager
def open_rows(source: Path) -> Iterator[Rows]:
    """Open a training set, a file or standard input (`-`), and yield its rows. Raises on entry, or while the rows are
    read: `Undecodable` if the format is unknown or the file is broken (the error names the line); `InvalidInput` if
    there are no rows or the columns are invalid; `StoreUnavailable` if the file cannot be read or pyarrow is
    missing."""
    shown = "standard input" if str(source) == "-" else str(source)
    with ExitStack() as stack:
        with _reading(shown):
            file = stack.enter_context(sys.stdin.buffer if str(source) == "-" else source.open("rb"))
            if not file.seekable():
                pipe, file = file, stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(pipe, file)
                file.seek(0)
            rows = _rows(file, shown)
        yield Rows(rows.names, _at_least_one(rows.blocks, shown))


@contextmanager
def _reading(shown: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise Undecodable(f"{shown} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise StoreUnavailable(f"cannot read {shown}: {error}") from error


def _rows(file: IO[bytes], shown: str) -> Rows:
    start = file.tell()
    head = file.read(HEAD_BYTES).removeprefix(BOM_UTF8)
    file.seek(start)
    found = other_format(head)
    if found == "Parquet":
        rows = _parquet(file, shown)
    elif found not in (None, TABLE):
        raise Undecodable(f"{shown} is {found}; {EXPECTED}")
    elif head.lstrip()[:1] == b"{":
        rows = _ndjson(file)
    else:
        rows = _csv(file)
    _check(rows.names, shown)
    return rows


def _check(names: Sequence[str], shown: str) -> None:
    if not names:
        raise InvalidInput(f"{shown} is empty; {EXPECTED}")
    if DECISION_KEY in names:
        detail = "is added from the decision; remove the column, or rename decision_id"
        issues = [Issue(name, detail) for name in MOMENT_KEYS if name in names]
    else:
        detail = f"missing; the columns are {', '.join(names)}"
        issues = [Issue(name, detail) for name in MOMENT_KEYS if name not in names]
    issues += [Issue(name, f"the name of {count} columns") for name, count in Counter(names).items() if count > 1]
    if issues:
        raise InvalidInput(f"the columns of {shown} are invalid", issues)


def _keys(names: Collection[str]) -> Sequence[str]:
    return (DECISION_KEY,) if DECISION_KEY in names else MOMENT_KEYS


def _at_least_one(blocks: Iterator[Block], shown: str) -> Iterator[Block]:
    with _reading(shown):
        if (first := next(blocks, None)) is None:
            raise InvalidInput(f"{shown} has no rows; {EXPECTED}")
        yield first
        yield from blocks


def _csv(file: IO[bytes]) -> Rows:
    records = _records(csv.reader((line.decode() for line in _lines(file)), strict=True))
    _, names = next(records, (0, []))

    def rows() -> Iterator[tuple[int, Sequence[bytes]]]:
        for line, fields in records:
            if len(fields) != len(names):
                detail = f"it has {len(fields)} fields, and the header has {len(names)}"
                raise InvalidInput("a row is not allowed", [Issue(f"line {line}", detail)])
            yield line, list(map(_encode, fields))

    return Rows(names, _blocks(rows(), dict.fromkeys(names, "text")))


def _blocks(rows: Iterator[tuple[int, Sequence[bytes]]], kinds: Mapping[str, Kind]) -> Iterator[Block]:
    """Collect rows into blocks. `rows` yields the line number of each row, and its values as JSON."""
    while piece := list(islice(rows, BLOCK)):
        values = zip(*(row for _, row in piece), strict=True)
        columns = {name: JsonColumn(column, kinds[name]) for name, column in zip(kinds, values, strict=True)}
        keys = {name: _strings(columns[name].values) for name in _keys(columns)}
        yield Block("line", [line for line, _ in piece], keys, dict(columns))


def _records(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the number of its first line. Blank lines are skipped."""
    line = 1
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise Undecodable("the file cannot be read", [Issue(f"line {line}", f"not CSV: {error}")]) from error


def _ndjson(file: IO[bytes]) -> Rows:
    start = file.tell()
    kinds: dict[str, Kind | None] = {}
    for number, line in _numbered(file):
        for name, value in _object(number, line).items():
            kind = None if value is None else _KINDS[type(value)]
            if kind == "int" and not -(1 << 63) <= value < 1 << 63:
                kind = "text"
            if (known := kinds.setdefault(name, kind)) != kind and kind is not None:
                kinds[name] = kind if known is None else "float" if {known, kind} == {"int", "float"} else "text"
    file.seek(start)
    rows = ((number, _decode_raw(line)) for number, line in _numbered(file))
    values = ((number, [bytes(row.get(name, NULL)) for name in kinds]) for number, row in rows)
    return Rows(list(kinds), _blocks(values, {name: kind or "text" for name, kind in kinds.items()}))


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    yield file.readline().removeprefix(BOM_UTF8)
    yield from file


def _numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(_lines(file), start=1) if line.strip())


def _object(number: int, line: bytes) -> dict[str, Any]:
    try:
        found = _decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        detail = f"not JSON: {str(error).removeprefix('JSON is malformed: ')}; {EXPECTED}"
        raise Undecodable("the file cannot be read", [Issue(f"line {number}", detail)]) from error
    if not isinstance(found, dict):
        raise InvalidInput("a row is not allowed", [Issue(f"line {number}", "not a JSON object")])
    return found


def _strings(values: Sequence[bytes]) -> list[str | None]:
    return [_decode(value) or None if value[:1] == b'"' else None for value in values]


def _parquet(file: IO[bytes], shown: str) -> Rows:
    pa = pyarrow()
    try:
        found = pa.parquet.ParquetFile(file, buffer_size=1 << 16)
    except pa.ArrowException as error:
        raise Undecodable(f"{shown} is broken Parquet: {error}") from error
    return Rows(found.schema_arrow.names, _parquet_blocks(found, shown))


def _parquet_blocks(file: Any, shown: str) -> Iterator[Block]:
    pa = pyarrow()
    first = 1
    try:
        for batch in file.iter_batches(BLOCK):
            columns = {name: ArrowColumn(array) for name, array in zip(batch.schema.names, batch.columns, strict=True)}
            yield Block(
                "row",
                range(first, first + len(batch)),
                {name: _arrow_key(columns[name], batch[name].type, name) for name in _keys(columns)},
                dict(columns),
            )
            first += len(batch)
    except pa.ArrowException as error:
        raise Undecodable(f"{shown} is broken Parquet: {error}") from error


def _arrow_key(column: ArrowColumn, kind: Any, name: str) -> Sequence[str | int | None]:
    pa = pyarrow()
    if name == "as_of" and (moments := column.moments_ms()) is not None:
        return moments
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(value_type) not in ("string", "large_string", "string_view"):
        allowed = "text, or times with a time zone" if name == "as_of" else "text"
        raise InvalidInput("a column is not allowed", [Issue(name, f"its type is {kind}; it must be {allowed}")])
    return [value or None for value in column.text()]
