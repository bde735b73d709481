"""Training sets on disk: what is written is read again, typed, and a file appears only whole."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import InvalidInput, StoreUnavailable
from app.stores.training_set import output
from app.stores.training_set.columns import Column, JsonColumn, Kind
from app.stores.training_set.output import writer_for

KINDS: dict[str, Kind] = {"rate": "float", "count": "int", "kind": "text"}
NAMES = ["user_id", "as_of", *KINDS]
ROWS: list[list[Any]] = [
    ["ann", "2026-04-25T10:00:00.000Z", 1 / 3, 7, 'a "quoted", kind'],
    ["zoë\r2", "2026-04-25T10:00:00.001Z", None, None, None],
    ["bob\n", "2026-04-25T10:00:00.002Z", 1e-300, 2**62, "naïve\r\n%b"],
]
FILES = ["set.csv", "set.ndjson", "set.parquet"]


def columns(rows: list[list[Any]]) -> dict[str, Column]:
    kinds: list[Kind] = ["text", "text", *KINDS.values()]
    return {
        name: JsonColumn([json.dumps(value).encode() for value in column], kind)
        for name, kind, column in zip(NAMES, kinds, zip(*rows, strict=True), strict=True)
    }


def write(path: Path, *blocks: list[list[Any]]) -> None:
    with writer_for(path) as writer:
        for block in blocks:
            writer.write(columns(block))


def test_csv_gives_back_every_value_when_it_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "set.csv", ROWS[:1], ROWS[1:])
    with (tmp_path / "set.csv").open(encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file)
    assert header == NAMES
    assert [
        [user, as_of, float(rate) if rate else None, int(count) if count else None, kind or None]
        for user, as_of, rate, count, kind in found
    ] == ROWS


def test_ndjson_gives_back_every_value_when_it_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "set.ndjson", ROWS[:1], ROWS[1:])
    lines = (tmp_path / "set.ndjson").read_bytes().splitlines()
    assert [list(json.loads(line).items()) for line in lines] == [list(zip(NAMES, row, strict=True)) for row in ROWS]


def test_parquet_gives_back_every_value_typed_when_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "ROW_GROUP", 2)
    write(tmp_path / "set.parquet", ROWS[:1], ROWS[1:2], ROWS[2:])
    table = pq.read_table(tmp_path / "set.parquet")
    moment = pa.timestamp("us", "UTC")
    assert table.schema.types == [pa.string(), moment, pa.float64(), pa.int64(), pa.string()]
    times = [at.isoformat(timespec="milliseconds").replace("+00:00", "Z") for at in table["as_of"].to_pylist()]
    found = [list(row.values()) for row in table.to_pylist()]
    assert [[user, at, *rest] for (user, _, *rest), at in zip(found, times, strict=True)] == ROWS
    assert pq.ParquetFile(tmp_path / "set.parquet").num_row_groups == 2


@pytest.mark.parametrize("name", FILES)
def test_the_old_file_stays_when_writing_fails_half_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("from last time")

    def fail_half_way() -> None:
        with writer_for(tmp_path / name) as writer:
            writer.write(columns(ROWS))
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "from last time"


def test_rows_go_to_standard_output_when_no_file_is_named(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with writer_for(None) as writer:
        writer.write(columns(ROWS[:1]))
    assert capsysbinary.readouterr().out.splitlines() == [
        b"user_id,as_of,rate,count,kind",
        b'ann,2026-04-25T10:00:00.000Z,0.3333333333333333,7,"a ""quoted"", kind"',
    ]


def test_the_name_is_refused_when_its_ending_is_unknown(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidInput, match=r"set\.txt: the name must end in \.csv, \.ndjson, \.parquet"),
        writer_for(tmp_path / "set.txt"),
    ):
        pass


@pytest.mark.parametrize("name", FILES)
def test_the_path_is_named_when_it_cannot_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "no" / "such" / name
    with pytest.raises(StoreUnavailable, match=f"cannot write {path}"):
        write(path, ROWS)


def test_the_extra_is_named_when_pyarrow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreUnavailable, match="Parquet needs the `parquet` extra"):
        write(tmp_path / "set.parquet", ROWS)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "set.csv", ROWS)
    write(tmp_path / "set.ndjson", ROWS)
