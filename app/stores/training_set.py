"""Writing a training set: CSV, or Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from app.errors import InvalidInput, StoreUnavailable
from app.features.registry import Registry

ROW_GROUP = 10_000


class TrainingSetWriter(Protocol):
    """Where rows go."""

    def begin(self, registry: Registry) -> None:
        """Before the first row: user_id, as_of, then the features in the order of the registry."""
        ...

    def row(self, values: Sequence[object]) -> None:
        """One row; None is null."""
        ...


class CsvWriter:
    """Null is an empty field."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")

    def begin(self, registry: Registry) -> None:
        """The header."""
        self._writer.writerow(["user_id", "as_of", *registry.names])

    def row(self, values: Sequence[object]) -> None:
        """One line."""
        self._writer.writerow(["" if value is None else value for value in values])


class ParquetWriter:
    """Typed columns, in row groups of bounded size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[Sequence[object]] = []
        self._schema: Any = None
        self._writer: Any = None

    def begin(self, registry: Registry) -> None:
        """The schema, from the dtypes."""
        try:
            import pyarrow as pa  # noqa: PLC0415  # optional, and slow to import
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as error:
            raise StoreUnavailable("Parquet needs the `parquet` extra (pyarrow); CSV does not") from error
        kinds = {"float": pa.float64(), "int": pa.int64(), "str": pa.string()}
        columns = [("user_id", pa.string()), ("as_of", pa.string())]
        self._schema = pa.schema(columns + [(entry.name, kinds[entry.dtype]) for entry in registry])
        self._writer = pq.ParquetWriter(self._path, self._schema)

    def row(self, values: Sequence[object]) -> None:
        """Kept until a row group is full."""
        self._pending.append(values)
        if len(self._pending) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left and the footer."""
        if self._writer is not None:
            self._flush()
            self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            import pyarrow as pa  # noqa: PLC0415

            columns = [list(column) for column in zip(*self._pending, strict=True)]
            self._writer.write_table(pa.table(columns, schema=self._schema))
            self._pending.clear()


@contextmanager
def writer_for(path: Path | None) -> Iterator[TrainingSetWriter]:
    """A writer for a file by its suffix, or CSV on standard output. A file appears only when all of it is written."""
    if path is None:
        yield CsvWriter(sys.stdout)
        return
    if path.suffix not in (".csv", ".parquet"):
        raise InvalidInput(f"cannot tell the format of {path.name}: the name must end in .csv or .parquet")
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix == ".csv":
            with part.open("w", encoding="utf-8", newline="") as file:
                yield CsvWriter(file)
        else:
            parquet = ParquetWriter(part)
            yield parquet
            parquet.close()
        part.replace(path)
    except OSError as error:
        raise StoreUnavailable(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
