"""Writes a training set as CSV, NDJSON or, if pyarrow is installed, Parquet."""

import csv
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import IO, Any

import msgspec

from app.errors import InvalidInput, StoreUnavailable
from app.stores.training_set.columns import ArrowColumn, Column, pyarrow

ROW_GROUP = 10_000


class TrainingSetWriter(ABC):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    @abstractmethod
    def write(self, columns: Mapping[str, Column]) -> None:
        """Write some rows. `columns` maps names to values, and must have the same names in every call."""

    def close(self) -> None:
        """Write the buffered rows. The file stays open."""
        self._file.flush()


class CsvWriter(TrainingSetWriter):
    _begun = False

    def write(self, columns: Mapping[str, Column]) -> None:
        rows = list(zip(*(column.text() for column in columns.values()), strict=True))
        if not self._begun:
            rows.insert(0, tuple(columns))
            self._begun = True
        text = _csv(rows, csv.QUOTE_MINIMAL)
        # An unquoted carriage return within a field would end the row; the csv module quotes it from Python 3.13 on.
        self._file.write((_csv(rows, csv.QUOTE_ALL) if "\r" in text else text).encode())


class NdjsonWriter(TrainingSetWriter):
    def write(self, columns: Mapping[str, Column]) -> None:
        members = [msgspec.json.encode(name).replace(b"%", b"%%") + b":%b" for name in columns]
        line = b"{" + b",".join(members) + b"}\n"
        values = zip(*(column.json() for column in columns.values()), strict=True)
        self._file.writelines(line % row for row in values)


class ParquetWriter(TrainingSetWriter):
    """Writes Parquet in row groups of at least `ROW_GROUP` rows. The column `as_of` always has the type timestamp."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._pending: list[Any] = []
        self._rows = 0
        self._writer: Any = None
        pyarrow()

    def write(self, columns: Mapping[str, Column]) -> None:
        pa = pyarrow()
        arrays = [_times(column) if name == "as_of" else column.arrow() for name, column in columns.items()]
        self._pending.append(pa.table(arrays, names=list(columns)))
        self._rows += len(arrays[0])
        if self._rows >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        pa = pyarrow()
        if self._pending:
            table = pa.concat_tables(self._pending).unify_dictionaries()
            if self._writer is None:
                self._writer = pa.parquet.ParquetWriter(self._file, table.schema)
            self._writer.write_table(table)
            self._pending, self._rows = [], 0


def _csv(rows: list[tuple[str, ...]], quoting: int) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n", quoting=quoting).writerows(rows)  # type: ignore[arg-type]
    return text.getvalue()


def _times(column: Column) -> Any:
    pa = pyarrow()
    if isinstance(column, ArrowColumn) and pa.types.is_timestamp(column.array.type):
        return column.array
    return pa.array([datetime.fromisoformat(moment) for moment in column.text()], pa.timestamp("us", "UTC"))


WRITERS: dict[str, type[TrainingSetWriter]] = {".csv": CsvWriter, ".ndjson": NdjsonWriter, ".parquet": ParquetWriter}


@contextmanager
def writer_for(path: Path | None, default: type[TrainingSetWriter] = CsvWriter) -> Iterator[TrainingSetWriter]:
    """Yield a writer for the format that the suffix of `path` names; without a path, a `default` on standard output."""
    if path is not None and path.suffix not in WRITERS:
        raise InvalidInput(f"cannot tell the format of {path.name}: the name must end in {', '.join(WRITERS)}")
    with new_file(path) if path is not None else nullcontext(sys.stdout.buffer) as file:
        writer = (WRITERS[path.suffix] if path is not None else default)(file)
        yield writer
        writer.close()


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write, which appears under its name only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
