"""`history`: the features of each row's own moment beside all that the row brought, in every format; bad rows named."""

import asyncio
import csv
import gzip
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from io import StringIO, TextIOWrapper
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.bandit.decisions import Decision, Origin, ScoringRequest
from app.bandit.model.inputs import Context
from app.bootstrap.service import open_service
from app.features.clock import DAY_MS, EPOCH, MILLISECOND, rfc3339, to_ms
from app.features.registry import DTYPES
from app.settings import Settings
from tests.integration.cli.conftest import Outcome, Run, default_database, write_events
from tests.support.events import payload, served
from tests.support.processes import environment_of, interruptible
from tests.support.registry import FEATURES, REGISTRY
from tests.support.score_requests import tip
from tests.support.traffic import now_ms
from tests.support.waiting import PATIENCE_S, eventually_sync

NAMES = list(REGISTRY.names)


def moments(count: int) -> list[tuple[str, str]]:
    """Users and moments of a training set, written with an offset and microseconds."""
    start = EPOCH + (now_ms() - 20 * DAY_MS) * MILLISECOND
    zone = timezone(timedelta(hours=5, minutes=30))
    times = [start + timedelta(hours=8 * n, microseconds=7 * n) for n in range(count)]
    return [("ann" if n % 2 else "bob", at.astimezone(zone).isoformat()) for n, at in enumerate(times)]


def features(profiles: Run, rows: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Each row's features as `profile --as-of` says, which is what GET says."""
    return [profiles("profile", user, "--json", "--as-of", at).json["features"] for user, at in rows]


def typed(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV training set, the features with their types."""
    return [
        {
            name: (DTYPES[REGISTRY.named(name).dtype](value) if value else None) if name in NAMES else value
            for name, value in row.items()
        }
        for row in csv.DictReader(StringIO(text, newline=""))
    ]


def volumes(shown: Outcome) -> list[int]:
    assert shown.code == 0, shown.err
    return [row["tip_volume_30d"] for row in typed(shown.out)]


# --- all columns, in every format


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)


def as_ndjson(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in rows))


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)


WRITTEN = {".csv": as_csv, ".ndjson": as_ndjson, ".parquet": as_parquet}


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return found
    if path.suffix == ".ndjson":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return typed(path.read_bytes().decode())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "to"),
    [pytest.param(*pair, marks=() if pair[0] == pair[1] else pytest.mark.slow) for pair in product(WRITTEN, repeat=2)],
)
def test_all_columns_are_kept_in_order_beside_the_features(lived_in: Run, tmp_path: Path, source: str, to: str) -> None:
    """More rows than are read at once; `as_of` stays as it was given, except that it is a timestamp in Parquet."""
    asked = moments(9) * 40
    labels = [(0, 0.1, "zoë"), (1, 2.5, 'a "b",\r\nc'), (None, None, None)]
    rows = [
        {"label": labels[n % 3][0], "user_id": user, "weight": labels[n % 3][1], "as_of": at, "note": labels[n % 3][2]}
        for n, (user, at) in enumerate(asked)
    ]
    WRITTEN[source](tmp_path / f"rows{source}", rows)
    shown = lived_in("history", f"rows{source}", "--output", f"set{to}")
    assert (shown.code, shown.out, shown.err) == (0, "", f"360 rows written to set{to}\n")

    found = read(tmp_path / f"set{to}")
    assert [list(row) for row in found] == [[*rows[0], *NAMES]] * 360
    truth = features(lived_in, asked[:9]) * 40
    assert len({json.dumps(row) for row in truth}) > 4
    assert [{name: row[name] for name in NAMES} for row in found] == truth
    as_text = ".csv" in (source, to)
    for row, given in zip(found, rows, strict=True):
        kept = {name: row[name] for name in given}
        if to == ".parquet":
            kept["as_of"] = given["as_of"] if row["as_of"] == datetime.fromisoformat(str(given["as_of"])) else None
        assert (
            kept == {name: "" if value is None else str(value) for name, value in given.items()} if as_text else given
        )


def test_parquet_has_typed_columns_when_json_is_read(lived_in: Run, tmp_path: Path) -> None:
    at = rfc3339(now_ms() - DAY_MS)
    more: list[dict[str, Any]] = [
        {"flag": True, "number": 1, "mixed": 1, "nested": {"a": [1]}, "big": 1 << 70},
        {"flag": None, "number": 0.5, "mixed": "one", "late": 7, "nothing": None},
    ]
    as_ndjson(tmp_path / "rows", [{"user_id": "ann", "as_of": at, **row} for row in more])
    assert lived_in("history", "rows", "--output", "set.parquet").code == 0
    table = pq.read_table(tmp_path / "set.parquet").drop_columns(NAMES)
    assert {field.name: str(field.type) for field in table.schema} == {
        "user_id": "string",
        "as_of": "timestamp[us, tz=UTC]",
        "flag": "bool",
        "number": "double",
        "mixed": "string",
        "nested": "string",
        "big": "string",
        "late": "int64",
        "nothing": "string",
    }
    assert [list(row.values())[2:] for row in table.to_pylist()] == [
        [True, 1.0, "1", '{"a": [1]}', str(1 << 70), None, None],
        [None, 0.5, "one", None, None, 7, None],
    ]


@pytest.mark.parametrize(
    ("unit", "zone"),
    [
        pytest.param("ms", "Europe/Berlin", marks=pytest.mark.slow),
        pytest.param("us", "UTC", marks=pytest.mark.slow),
        ("ns", "Europe/Berlin"),
    ],
)
def test_types_are_kept_from_parquet_to_parquet(lived_in: Run, tmp_path: Path, unit: str, zone: str) -> None:
    start_s = now_ms() // 1000 - 5 * 86_400
    stamps = [start_s * 10**9 + digits for digits in (0, 123_456_789)] * 300
    times = pa.array(stamps, pa.timestamp("ns", zone)).cast(pa.timestamp(unit, zone), safe=False)
    table = pa.table(
        {
            "as_of": times,
            "day": pa.array([20_000] * 600, pa.date32()),
            "user_id": pa.array(["ann", "bob"] * 300).dictionary_encode(),
            "label": pa.array([1, None] * 300, pa.int8()),
            "tags": pa.array([["a"], None] * 300),
            "raw": pa.array([b"\xff", b""] * 300),
            "naive": times.cast(pa.timestamp(unit)),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    assert lived_in("history", "rows.parquet", "--output", "set.parquet").code == 0
    found = pq.read_table(tmp_path / "set.parquet")
    assert found.drop_columns(NAMES).equals(table)

    # As text, `as_of` has every digit, and leads to the same values.
    assert lived_in("history", "rows.parquet", "--output", "set.csv").code == 0
    first, second, *_ = read(tmp_path / "set.csv")
    assert datetime.fromisoformat(first["as_of"]) == datetime.fromtimestamp(start_s, UTC)
    digits = {"ms": ".123", "us": ".123456", "ns": ".123456789"}[unit]
    assert second["as_of"].endswith(f"{digits}Z")
    assert (first["tags"], second["tags"], first["label"], second["label"]) == ('["a"]', "", "1", "")
    assert lived_in("history", "rows.parquet", "--output", "set.ndjson").code == 0
    lines = read(tmp_path / "set.ndjson")
    assert [line["as_of"] for line in lines[:2]] == [first["as_of"], second["as_of"]]
    assert (lines[0]["tags"], lines[0]["label"], lines[1]["label"]) == (["a"], 1, None)
    assert [{name: line[name] for name in NAMES} for line in lines] == found.select(NAMES).to_pylist()


def test_as_of_is_a_timestamp_in_parquet_when_it_was_text(lived_in: Run, tmp_path: Path) -> None:
    at = rfc3339(now_ms() - DAY_MS)
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        table = pa.table({"user_id": pa.array(["ann"], kind), "as_of": pa.array([at], kind)})
        pq.write_table(table, tmp_path / "rows.parquet")
        assert lived_in("history", "rows.parquet", "--output", "set.parquet").code == 0
        found = pq.read_table(tmp_path / "set.parquet")
        assert (found.schema.types[0], found["user_id"].to_pylist()) == (kind, ["ann"])
        assert str(found.schema.types[1]) == "timestamp[us, tz=UTC]"
        assert found["as_of"].to_pylist() == [datetime.fromisoformat(at)]


def test_only_named_features_are_computed(lived_in: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"user_id,as_of,preferred_hour\nann,{rfc3339(now_ms() - DAY_MS)},9\n")
    arguments = ("--features", "tip_volume_30d,dismiss_rate_30d", "--features", "tip_volume_30d")
    header, row = lived_in("history", "rows.csv", *arguments).out.splitlines()
    assert header == "user_id,as_of,preferred_hour,dismiss_rate_30d,tip_volume_30d"
    assert row.split(",")[2:] == ["9", str(5 / 15), "30"]
    shown = lived_in("history", "rows.csv", "--features", "tip_volume")
    assert (shown.code, "unknown feature 'tip_volume'; known are completion_rate_30d" in shown.err) == (5, True)
    # One that is computed may not be a column already.
    shown = lived_in("history", "rows.csv", "--output", "set.csv")
    assert (shown.code, "preferred_hour: is also a feature; rename the column" in shown.err) == (5, True)
    assert not (tmp_path / "set.csv").exists()


# --- where the input comes from


@pytest.mark.slow
@pytest.mark.parametrize(
    ("through", "source"),
    [
        pytest.param(*pair, marks=() if pair == ("pipe", ".csv") else pytest.mark.slow)
        for pair in product(["pipe", "fifo", "redirected"], WRITTEN)
    ],
)
def test_rows_come_through_a_pipe(
    lived_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, through: str
) -> None:
    """Larger than a pipe holds."""
    WRITTEN[source](tmp_path / "rows", [{"user_id": user, "as_of": at, "n": 1} for user, at in moments(9) * 300])
    expected = lived_in("history", "rows").out
    if through == "redirected":
        file = (tmp_path / "rows").open("rb")
    else:
        os.mkfifo(tmp_path / "fifo")
        content = (tmp_path / "rows").read_bytes()
        writer = threading.Thread(target=lambda: (tmp_path / "fifo").write_bytes(content))
        writer.start()
        if through == "fifo":
            assert lived_in("history", "fifo").out == expected
            writer.join()
            return
        file = (tmp_path / "fifo").open("rb")
    with TextIOWrapper(file) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        assert lived_in("history", "-").out == expected
    assert expected.count("\n") == 2_701


def test_byte_order_mark_is_accepted(lived_in: Run, tmp_path: Path) -> None:
    at = rfc3339(now_ms())
    (tmp_path / "rows.csv").write_bytes(f"\ufeff\r\n\r\nuser_id,as_of,label\r\n\r\nann,{at},1\r\n".encode())
    assert [row["label"] for row in typed(lived_in("history", "rows.csv").out)] == ["1"]
    (tmp_path / "rows.ndjson").write_bytes(f'\ufeff\r\n{{"user_id": "ann", "as_of": "{at}", "label": 1}}\r\n'.encode())
    assert [row["label"] for row in typed(lived_in("history", "rows.ndjson").out)] == ["1"]


ROW = b'{"user_id": "ann", "as_of": "2026-04-25T08:30:00Z"}'
BAD_FILES = {
    "is a JSON array; expected is CSV": b"[" + ROW + b"]",
    "is one JSON document over several lines": json.dumps(json.loads(ROW), indent=2).encode(),
    "line 1: not JSON": b'{"user_id": "ann",\n"as_of": "2026-04-25T08:30:00Z"}',
    "is gzip": gzip.compress(ROW),
    "is text in UTF-16": ROW.decode().encode("utf-16"),
    "is text in UTF-16;": "user_id,as_of\n".encode("utf-16-le"),
    "is not UTF-8 text": "user_id,as_of\nzoë,x\n".encode("latin-1"),
    "is empty": b"",
    "is empty;": b"\xef\xbb\xbf\n \n",
    "has no rows": b"user_id,as_of\n\n",
    "user_id: missing; the columns are who, as_of": b"who,as_of\nann,2026-04-25T08:30:00Z\n",
    "as_of: missing; the columns are user_id;as_of": b"user_id;as_of\nann;2026-04-25T08:30:00Z\n",
    "as_of: missing; the columns are user_id": b'{"user_id": "ann"}\n',
    "as_of: the name of 2 columns": b"user_id,as_of,as_of\nann,2026-04-25T08:30:00Z,1\n",
    "line 3: it has 3 fields, and the header has 2": b"user_id,as_of\n\nann,2026-04-25T08:30:00Z,1\n",
    "line 2: not CSV": b'user_id,as_of\nann,"2026-04-25T08:30:00Z\n',
    "is broken Parquet": b"PAR1 and no more",
}


@pytest.mark.slow
def test_file_that_cannot_be_read_is_refused(migrated: Run, tmp_path: Path) -> None:
    for message, content in BAD_FILES.items():
        (tmp_path / "rows").write_bytes(content)
        shown = migrated("history", "rows", "--output", "set.csv")
        assert (shown.code, message in shown.err) == (5, True), (message, shown.err)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("set")] == []


BAD_COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"user_id": pa.array([7]), "as_of": pa.array(["x"])}, "user_id: its type is int64; it must be text"),
    (
        {"user_id": ["ann"], "as_of": pa.array([0], pa.timestamp("ns"))},
        "as_of: its type is timestamp[ns]; it must be text, or times with a time zone",
    ),
    ({"user_id": ["ann", None], "as_of": [datetime.now(UTC)] * 2}, "row 2, user_id: is missing or not text"),
    ({"user_id": ["ann"] * 2, "as_of": [datetime.now(UTC), None]}, "row 2, as_of: is missing or not text"),
    ({"user_id": ["ann"] * 2, "as_of": [datetime.now(UTC), EPOCH]}, "row 2, as_of: reaches back beyond kept"),
    ({"user_id": ["ann"], "as_of": ["soon"]}, "row 1, as_of: 'soon' is not a time"),
    ({"user_id": pa.array([], pa.string()), "as_of": pa.array([], pa.string())}, "rows has no rows"),
]


def test_bad_parquet_column_or_row_is_named(migrated: Run, tmp_path: Path) -> None:
    for columns, message in BAD_COLUMNS:
        pq.write_table(pa.table(columns), tmp_path / "rows")
        shown = migrated("history", "rows")
        assert (shown.code, message in shown.err) == (5, True), (message, shown.err)


BAD_ROWS = [
    ("user_id,as_of\nann,{now}\n\nbob,soon\n", "line 4, as_of: 'soon' is not a time"),
    ("user_id,as_of\nann,{now}\nbob,\n", "line 3, as_of: is missing or not text"),
    ('user_id,as_of,note\nann,{now},"two\nlines"\n,{now},x\n', "line 4, user_id: is missing or not text"),
    ('user_id,as_of,note\nann,{now},x\n..,{now},"two\nlines"\n', "line 3, user_id: must not be . or .."),
    ("user_id,as_of\nann,{now}\nbob,2999-01-01T00:00:00Z\n", "line 3, as_of: lies in the future"),
    ("user_id,as_of\nann,2001-01-01T00:00:00Z\n", "line 2, as_of: reaches back beyond kept history"),
    (
        '{{"user_id": "ann", "as_of": "{now}"}}\n\n{{"user_id": 7, "as_of": "{now}"}}\n',
        "line 3, user_id: is missing",
    ),
    ('{{"user_id": "ann", "as_of": "{now}"}}\n{{"user_id": "ann"}}\n', "line 2, as_of: is missing"),
    ('{{"user_id": "ann", "as_of": "{now}"}}\n{{"user_id"\n', "line 2: not JSON"),
    ('{{"user_id": "ann", "as_of": "{now}", "x": "\\ud800"}}\n', "line 1: not JSON"),
    ('{{"user_id": "ann", "as_of": "{now}"}}\n[1]\n', "line 2: not a JSON object"),
]


@pytest.mark.slow
def test_line_is_named_when_a_row_is_wrong(lived_in: Run, tmp_path: Path) -> None:
    for text, message in BAD_ROWS:
        (tmp_path / "rows").write_text(text.format(now=rfc3339(now_ms())))
        shown = lived_in("history", "rows", "--output", "set.csv")
        assert (shown.code, message in shown.err) == (5, True), (message, shown.err)
        assert not (tmp_path / "set.csv").exists()


def test_history_is_refused_when_an_argument_is_wrong(migrated: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\nann,{rfc3339(now_ms())}\n")
    for command, code, message in [
        ("missing.csv", 2, "'missing.csv' does not exist"),
        ("rows.csv --output set.xlsx", 5, "the name must end in .csv, .ndjson, .parquet"),
        ("rows.csv --output no/such/set.csv", 4, "cannot write no/such/set.csv"),
        ("rows.csv --known-at later", 5, "--known-at: 'later' is not a time"),
        ("rows.csv --known-at 2999-01-01T00:00:00Z", 5, "--known-at: lies in the future"),
    ]:
        shown = migrated("history", *command.split())
        assert (shown.code, message in shown.err) == (code, True), (command, shown.err)


# --- rows that are decisions


async def _decide(directory: Path, user_id: str, *, origin: Origin = "service") -> Decision:
    settings = Settings(features=FEATURES, database=default_database(directory), shadow=False)
    async with open_service(settings, door="command") as service:
        request = ScoringRequest(
            user_id=user_id, candidates=(tip("tip", False, 1.0, 1.0),), context=Context(None), origin=origin
        )
        return await service.bandit.scorer.score(request)


@pytest.mark.slow
@pytest.mark.parametrize("source", [".csv", ".ndjson", ".parquet"])
def test_decisions_get_the_values_that_they_were_made_from(lived_in: Run, tmp_path: Path, source: str) -> None:
    made = [asyncio.run(_decide(tmp_path, user)) for user in ("ann", "bob", "ann")]
    later = served("ann", now_ms())
    lived_in("events", write_events(tmp_path / "later.ndjson", payload(later)))
    rows = [{"label": str(number), "decision_id": decision.id} for number, decision in enumerate(made)]
    WRITTEN[source](tmp_path / f"rows{source}", rows)
    for target in (".csv", ".ndjson", ".parquet"):
        shown = lived_in("history", f"rows{source}", "--output", f"set{target}")
        assert shown.code == 0, shown.err
        found = read(tmp_path / f"set{target}")
        assert [list(row) for row in found] == [["label", "decision_id", "user_id", "as_of", *NAMES]] * 3
        for row, decision, sent in zip(found, made, rows, strict=True):
            assert {name: row[name] for name in sent} == sent
            assert decision.profile_read is not None
            assert decision.profile is not None
            at = row["as_of"]
            assert (at if isinstance(at, str) else rfc3339(to_ms(at))) == rfc3339(decision.profile_read.at_ms)
            assert row["user_id"] == decision.user_id
            assert {name: row[name] for name in NAMES} == {name: decision.profile[name] for name in NAMES}


def test_decision_that_cannot_be_used_is_named(lived_in: Run, tmp_path: Path) -> None:
    sound, absent = (asyncio.run(_decide(tmp_path, "ann", origin=origin)).id for origin in ("service", "absent"))
    for text, message in [
        (f"decision_id\n{sound}\nnone\n", "line 3, decision_id: there is no such decision"),
        (f"decision_id,x\n{sound},1\n,2\n", "line 3, decision_id: is missing or not text"),
        (f"decision_id\n{absent}\n", "line 2, decision_id: the service did not read its profile"),
        (f"decision_id,user_id\n{sound},ann\n", "user_id: is added from the decision"),
        ("x\n1\n", "user_id: missing; the columns are x"),
    ]:
        (tmp_path / "rows").write_text(text)
        shown = lived_in("history", "rows")
        assert (shown.code, message in shown.err) == (5, True), (message, shown.err)
    (tmp_path / "rows").write_text(f"decision_id\n{sound}\n")
    for arguments in (("--before",), ("--known-at", "as_of")):
        shown = lived_in("history", "rows", *arguments)
        assert (shown.code, f"{arguments[0]}: has no meaning" in shown.err) == (5, True), shown.err


# --- which events count


def test_as_of_is_inclusive_unless_before_is_given(lived_in: Run, tmp_path: Path) -> None:
    """The event that a label is made of must not be among its features."""
    at_ms = now_ms() - DAY_MS // 2
    assert lived_in("events", write_events(tmp_path / "more", payload(served("ann", at_ms)))).code == 0
    texts = [rfc3339(at_ms), f"{rfc3339(at_ms)[:-1]}999Z", rfc3339(at_ms + 1)]
    (tmp_path / "rows.csv").write_text("user_id,as_of\n" + "".join(f"ann,{text}\n" for text in texts))
    inclusive = volumes(lived_in("history", "rows.csv"))
    shown = lived_in("history", "rows.csv", "--before")
    assert volumes(shown) == [inclusive[0] - 1, inclusive[1] - 1, inclusive[2]]
    assert [row["as_of"] for row in typed(shown.out)] == texts


def test_late_events_are_left_out_when_known_at_is_received(lived_in: Run, tmp_path: Path) -> None:
    """Everything was loaded a moment ago: at no row's own moment was anything known."""
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\nann,{rfc3339(now_ms() - DAY_MS)}\n")
    late = lived_in("history", "rows.csv", "--known-at", "as_of")
    assert volumes(late) == [0]
    assert "100% of the rows have no values because every event up to their as_of arrived too late" in late.err
    whole = lived_in("history", "rows.csv", "--known-at", rfc3339(now_ms()))
    assert (volumes(whole), whole.err) == ([30], "")


@pytest.mark.slow
def test_late_events_are_not_mentioned_without_any(lived_in: Run, tmp_path: Path) -> None:
    at = rfc3339(now_ms() - DAY_MS)
    rows = "".join(f"{user},{at}\n" for user in ["ann", *(f"cold-{n}" for n in range(1, 1_500))])
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\n{rows}")
    shown = lived_in("history", "rows.csv", "--known-at", "as_of")
    assert (len(volumes(shown)), shown.err) == (1_500, "")
    (tmp_path / "rows.csv").write_text("user_id,as_of\n" + f"ann,{at}\n" * 1_200 + rows.removeprefix(f"ann,{at}\n"))
    assert lived_in("history", "rows.csv", "--known-at", "as_of").err == ""


def arrivals(directory: Path) -> dict[str, tuple[bool, bool]]:
    """By event id: whether the log, and the fact, say that it arrived when it occurred."""
    with closing(sqlite3.connect(directory / "var/profiles.db")) as connection:
        rows = connection.execute(
            """SELECT event_id, log.received_at_ms = log.occurred_at_ms, view.received_at_ms = view.occurred_at_ms
            FROM event_log AS log JOIN tip_views AS view USING (seq)"""
        ).fetchall()
    return {event_id: (bool(log), bool(fact)) for event_id, log, fact in rows}


@pytest.mark.slow
def test_historical_events_are_known_from_their_own_time(migrated: Run, tmp_path: Path) -> None:
    at_ms = now_ms() - 3 * DAY_MS
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\nann,{rfc3339(at_ms)}\nann,{rfc3339(at_ms - 1)}\n")
    one, two, three = (payload(served("ann", at_ms, event_id=name)) for name in ("one", "two", "three"))
    assert migrated("events", write_events(tmp_path / "events", one, three)).code == 0
    assert arrivals(tmp_path) == {"one": (False, False), "three": (False, False)}
    assert volumes(migrated("history", "rows.csv", "--known-at", "as_of")) == [0, 0]

    # What was loaded without the option is mended by loading it again; the log keeps the arrival, for the workers.
    shown = migrated("events", write_events(tmp_path / "events", one, two), "--historical")
    assert shown.out == "1 events stored, 1 duplicates, 0 refused\n"
    assert arrivals(tmp_path) == {"one": (False, True), "two": (False, True), "three": (False, False)}
    assert volumes(migrated("history", "rows.csv", "--known-at", "as_of")) == [2, 0]

    # A refused event changes nothing.
    clashing = write_events(tmp_path / "events", {**three, "tip_id": "another"})
    assert migrated("events", clashing, "--historical", "--skip-bad").code == 1
    assert arrivals(tmp_path)["three"] == (False, False)
    (tmp_path / "events").write_text("[]")
    assert migrated("events", "events", "--historical").code == 5
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection:
        trail = connection.execute("SELECT actor, action, outcome FROM audit_trail ORDER BY id").fetchall()
    assert {(actor, action) for actor, action, _ in trail} == {("the command line", "load historical events")}
    assert [outcome for _, _, outcome in trail[:2]] == [
        "1 events stored, 1 duplicates, 0 refused",
        "0 events stored, 0 duplicates, 1 refused",
    ]
    assert trail[2][2].startswith("refused: events is a JSON array")


def test_demo_set_is_known_at_its_own_times(migrated: Run, tmp_path: Path) -> None:
    assert migrated("demo", "--users", "5", "--days", "40").code == 0
    at = rfc3339(now_ms() - 5 * DAY_MS)
    (tmp_path / "rows.csv").write_text("user_id,as_of\n" + "".join(f"user-{n:04d},{at}\n" for n in range(1, 6)))
    known = migrated("history", "rows.csv", "--known-at", "as_of")
    assert (known.out, known.err) == (migrated("history", "rows.csv").out, "")
    assert sum(volumes(known)) > 0


# --- a run that is stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "to"),
    [
        (signal.SIGINT, 1, ".csv"),
        pytest.param(signal.SIGTERM, 143, ".ndjson", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, ".parquet", marks=pytest.mark.slow),
    ],
)
def test_no_file_is_left_when_history_is_stopped(
    lived_in: Run, tmp_path: Path, number: int, code: int, to: str
) -> None:
    (tmp_path / "rows.csv").write_text("user_id,as_of\n" + f"ann,{rfc3339(now_ms())}\n" * 300_000)
    command = [sys.executable, "-m", "app", "history", "rows.csv", "--output", f"set{to}"]
    with interruptible(command, cwd=tmp_path, env=environment_of(), stderr=subprocess.PIPE, text=True) as running:
        part = tmp_path / f"set{to}.part"
        eventually_sync(lambda: part.exists() and (part.stat().st_size > 0 or to == ".parquet"))
        running.send_signal(number)
        _, told = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, "Traceback" in told) == (code, False), told
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("set")] == []
