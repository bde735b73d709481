"""Training sets on disk: what is written is read again, typed, and a file appears only whole."""

from __future__ import annotations

import csv
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import InvalidInput, StoreUnavailable
from app.features.registry import Registry
from app.stores import training_set
from app.stores.training_set import writer_for
from tests.support.entries import entry

REGISTRY = Registry(
    [
        entry(name="rate", dtype="float", ttl=timedelta(hours=1)),
        entry(name="count", dtype="int"),
        entry(name="kind", dtype="str"),
    ]
)
ROWS: list[list[Any]] = [
    ["ann", "2026-04-25T10:00:00.000Z", 1 / 3, 7, 'a "quoted", kind'],
    ["zoë\n2", "2026-04-25T10:00:00.001Z", None, None, None],
    ["bob", "2026-04-25T10:00:00.002Z", 1e-300, 2**62, "naïve"],
]


def write(path: Path, rows: list[list[Any]]) -> None:
    with writer_for(path) as writer:
        writer.begin(REGISTRY)
        for row in rows:
            writer.row(row)


def test_csv_gives_back_every_value_when_it_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "set.csv", ROWS)
    with (tmp_path / "set.csv").open(encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file)
    assert header == ["user_id", "as_of", "rate", "count", "kind"]
    assert [
        [user, as_of, float(rate) if rate else None, int(count) if count else None, kind or None]
        for user, as_of, rate, count, kind in found
    ] == ROWS


def test_parquet_gives_back_every_value_typed_when_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_set, "ROW_GROUP", 2)
    write(tmp_path / "set.parquet", ROWS)
    table = pq.read_table(tmp_path / "set.parquet")
    assert table.schema.types == [pa.string(), pa.string(), pa.float64(), pa.int64(), pa.string()]
    assert [list(row.values()) for row in table.to_pylist()] == ROWS
    assert pq.ParquetFile(tmp_path / "set.parquet").num_row_groups == 2


@pytest.mark.parametrize("name", ["set.csv", "set.parquet"])
def test_a_file_has_its_header_when_there_are_no_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [])
    if name.endswith("csv"):
        assert (tmp_path / name).read_text() == "user_id,as_of,rate,count,kind\n"
    else:
        assert pq.read_table(tmp_path / name).num_rows == 0


@pytest.mark.parametrize("name", ["set.csv", "set.parquet"])
def test_the_old_file_stays_when_writing_fails_half_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("from last time")

    def fail_half_way() -> None:
        with writer_for(tmp_path / name) as writer:
            writer.begin(REGISTRY)
            writer.row(ROWS[0])
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "from last time"


def test_rows_go_to_standard_output_when_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with writer_for(None) as writer:
        writer.begin(REGISTRY)
        writer.row(ROWS[0])
    assert capsys.readouterr().out.splitlines() == [
        "user_id,as_of,rate,count,kind",
        'ann,2026-04-25T10:00:00.000Z,0.3333333333333333,7,"a ""quoted"", kind"',
    ]


def test_the_name_is_refused_when_its_ending_is_unknown(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidInput, match=r"set\.txt: the name must end in \.csv or \.parquet"),
        writer_for(tmp_path / "set.txt"),
    ):
        pass


@pytest.mark.parametrize("name", ["set.csv", "set.parquet"])
def test_the_path_is_named_when_it_cannot_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "no" / "such" / name
    with pytest.raises(StoreUnavailable, match=f"cannot write {path}"):
        write(path, ROWS)


def test_the_extra_is_named_when_pyarrow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreUnavailable, match="Parquet needs the `parquet` extra"):
        write(tmp_path / "set.parquet", ROWS)
    assert list(tmp_path.iterdir()) == []
