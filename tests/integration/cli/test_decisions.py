"""`profiles decisions export`: the log as Parquet, NDJSON and CSV, in memory that does not depend on its length."""

import asyncio
import csv
import json
import os
import sqlite3
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from app.bandit.decisions import DecisionRecord
from app.bandit.model.inputs import SPEC_V2
from tests.integration.cli.conftest import Run
from tests.support.database import copy_database
from tests.support.lived_decisions import write_log

MB = 1024


@pytest.fixture(scope="module")
def log(migrated_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copy_database(migrated_template, tmp_path_factory.mktemp("log") / "profiles.db", "log")
    asyncio.run(write_log(path, 120))
    return path


@pytest.mark.slow
def test_formats_have_the_same_decisions(profiles: Run, log: Path, tmp_path: Path) -> None:
    for name in ("x.parquet", "x.ndjson", "x.csv"):
        written = profiles("decisions", "export", "--output", name, database=log)
        assert (written.code, written.err.strip()) == (0, f"120 decisions written to {name}")
    lines = [json.loads(line) for line in (tmp_path / "x.ndjson").read_text().splitlines()]
    assert len({line["decision_id"] for line in lines}) == 120
    assert [line["decided_at"] for line in lines] == sorted(line["decided_at"] for line in lines)
    assert {*lines[0]} == {*DecisionRecord.__struct_fields__}
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    with (tmp_path / "x.csv").open() as file:
        texts = list(csv.DictReader(file))
    for line, row, text in zip(lines, table, texts, strict=True):
        assert np.shape(row["phi"]) == (4, SPEC_V2.size)
        assert {*row} == {*line}
        for name, value in line.items():
            if name.endswith("_at"):
                assert row[name] == (value and datetime.fromisoformat(value)), name
            elif isinstance(value, dict) or name == "candidates":
                assert json.loads(row[name]) == value, name
            else:
                assert row[name] == value, name
        for name in ("candidates", "profile", "phi"):
            assert json.loads(text[name]) == line[name], name


@pytest.mark.slow
def test_damaged_decisions_are_left_out_and_logged(profiles: Run, log: Path, tmp_path: Path) -> None:
    damaged = copy_database(log, tmp_path / "damaged.db", "damaged")
    with closing(sqlite3.connect(damaged)) as connection, connection:
        connection.execute("UPDATE tip_scores SET request = '{' WHERE number <= 3")
    written = profiles("decisions", "export", "--output", "x.ndjson", database=damaged)
    assert (written.code, written.err.count("decision_unreadable")) == (0, 3)
    assert "117 decisions written" in written.err


@pytest.mark.slow
def test_only_decisions_of_the_time_are_exported(profiles: Run, log: Path) -> None:
    everything = profiles("decisions", "export", "--output", "-", database=log).out.splitlines()
    times = [json.loads(line)["decided_at"] for line in everything]
    part = profiles("decisions", "export", "--since", times[10], "--until", times[30], "--output", "-", database=log)
    assert part.out.splitlines() == everything[10:30]
    refused = profiles("decisions", "export", "--since", "yesterday", "--output", "-", database=log)
    assert (refused.code, "--since: 'yesterday' is not a time" in refused.err) == (5, True)
    backwards = ("--since", times[30], "--until", times[10])
    refused = profiles("decisions", "export", *backwards, "--output", "x.csv", database=log)
    assert (refused.code, "--since: must not be later than --until" in refused.err) == (5, True)


def test_file_has_its_columns_when_no_decision_is_of_the_time(profiles: Run, log: Path, tmp_path: Path) -> None:
    until = ("--until", "2001-01-01T00:00:00Z")
    for name in ("x.parquet", "x.ndjson", "x.csv"):
        written = profiles("decisions", "export", *until, "--output", name, database=log)
        assert (written.code, written.err.strip()) == (0, f"0 decisions written to {name}")
    names = list(DecisionRecord.__struct_fields__)
    table = pq.read_table(tmp_path / "x.parquet")
    assert (table.num_rows, table.column_names) == (0, names)
    assert (tmp_path / "x.csv").read_text() == ",".join(names) + "\n"
    assert not (tmp_path / "x.ndjson").read_bytes()


def _peak_kb(database: Path, output: str) -> int:
    """The peak memory of an export in a process of its own."""
    arguments = [sys.executable, "-m", "app", "decisions", "export", "--output", output]
    environment = {**os.environ, "PROFILES_DATABASE": str(database)}
    pid = os.spawnve(os.P_NOWAIT, sys.executable, arguments, environment)  # noqa: S606
    _, status, used = os.wait4(pid, 0)
    assert status == 0
    return used.ru_maxrss


@pytest.mark.parametrize("suffix", [".ndjson", ".parquet"])
@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_decisions(
    log: Path, migrated_template: Path, tmp_path: Path, suffix: str
) -> None:
    many = copy_database(migrated_template, tmp_path / "many.db", "many")
    asyncio.run(write_log(many, 120, copies=249))
    few, more = (_peak_kb(path, str(tmp_path / f"{path.stem}{suffix}")) for path in (log, many))
    written = (tmp_path / f"many{suffix}").stat().st_size
    assert written > 10_000 * MB / 1024
    # A row group of Parquet is 10,000 decisions.
    assert more - few < (20 if suffix == ".ndjson" else 80) * MB, (few, more)
