"""Columns of a training set. Each column keeps the representation of its source and is converted to another on demand.
Parquet columns are Arrow arrays, which preserves types. NDJSON columns hold the bytes of each value, so that `1.10`
stays `1.10`. CSV columns hold JSON strings, computed features hold JSON. CSV writes null as an empty field."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from app.errors import StoreUnavailable

NULL = b"null"
Kind = Literal["text", "int", "float", "bool", "time", "vector", "matrix"]
KINDS: dict[str, Kind] = {"float": "float", "int": "int", "str": "text"}  # by a feature's dtype
_LISTS: dict[Kind, Any] = {
    "int": list[int | None],
    "float": list[float | None],
    "bool": list[bool | None],
    "time": list[datetime | None],
    "vector": list[list[float] | None],
    "matrix": list[list[list[float]] | None],
}
_decode = msgspec.json.Decoder(str).decode


class JsonColumn(msgspec.Struct, frozen=True):
    """A column of JSON values. `kind` determines the type of the Arrow array. In a `text` column, a value that is no
    string is written as JSON."""

    values: Sequence[bytes]
    kind: Kind

    def text(self) -> Sequence[str]:
        return [value or "" for value in self._texts()]

    def json(self) -> Sequence[bytes]:
        return self.values

    def arrow(self) -> Any:
        pa = pyarrow()
        if self.kind == "text":
            return pa.array(self._texts(), pa.string())
        kinds = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "time": pa.timestamp("us", "UTC")}
        kinds["vector"] = pa.list_(kinds["float"])
        kinds["matrix"] = pa.list_(kinds["vector"])
        values = msgspec.json.decode(b"[%b]" % b",".join(self.values), type=_LISTS[self.kind])
        return pa.array(values, kinds[self.kind])

    def _texts(self) -> list[str | None]:
        return [
            _decode(value) if value[:1] == b'"' else None if value == NULL else value.decode() for value in self.values
        ]


class ArrowColumn(msgspec.Struct, frozen=True):
    array: Any

    def text(self) -> Sequence[str]:
        pa = pyarrow()
        try:
            return [value or "" for value in self._readable().cast(pa.string()).to_pylist()]
        except pa.ArrowException:  # nested, or bytes
            return ["" if value is None else json.dumps(value, default=str) for value in self.array.to_pylist()]

    def json(self) -> Sequence[bytes]:
        return [msgspec.json.encode(value, enc_hook=str) for value in self._readable().to_pylist()]

    def arrow(self) -> Any:
        return self.array

    def moments_ms(self) -> list[int | None] | None:
        """The column's times in milliseconds since 1970, rounded down; None unless it holds times with a time zone."""
        pa = pyarrow()
        kind = self.array.type
        if not pa.types.is_timestamp(kind) or kind.tz is None:
            return None
        found: list[int | None] = self.array.cast(pa.timestamp("ms", "UTC"), safe=False).cast("int64").to_pylist()
        return found

    def _readable(self) -> Any:
        """The column, with times as text such as `2026-07-01T08:30:00Z`, in the precision of the column. Times with a
        zone are converted to UTC; times without a zone are not converted and have no `Z`."""
        pa = pyarrow()
        kind = self.array.type
        if not pa.types.is_timestamp(kind):
            return self.array
        if kind.tz is None:
            return pa.compute.strftime(self.array, "%Y-%m-%dT%H:%M:%S")
        return pa.compute.strftime(self.array.cast(pa.timestamp(kind.unit, "UTC")), "%Y-%m-%dT%H:%M:%SZ")


# The values of one column in consecutive rows, as CSV fields (`text`), JSON or an Arrow array.
Column = JsonColumn | ArrowColumn


def pyarrow() -> Any:
    """The module `pyarrow`, with `compute` and `parquet`. Raises `StoreUnavailable` if it is not installed."""
    try:
        import pyarrow as pa  # noqa: PLC0415  # optional, and slow to import
        import pyarrow.compute  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise StoreUnavailable("Parquet needs the `parquet` extra (pyarrow); CSV and NDJSON do not") from error
    return pa
