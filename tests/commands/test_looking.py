"""`features`, `profile`, `history`: what they show is what the service serves, and a wrong line is named."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow.parquet as pq
import pytest

from app.features.clock import DAY_MS, rfc3339
from app.features.export import FORMATS
from app.features.registry import DTYPES
from app.features.schema import check_mirror
from tests.commands.conftest import Outcome, Run
from tests.support.events import feedback, payload, served
from tests.support.registry import REGISTRY, ProfileFeatures
from tests.support.traffic import now_ms

TYPESCRIPT = {"float": "number", "int": "number", "str": "string"}


def write_events(path: Path, *events: dict[str, Any]) -> str:
    """Newline-delimited JSON; the path as an argument."""
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


@pytest.fixture
def lived_in(migrated: Run, tmp_path: Path) -> Run:
    """A database with some weeks of two users."""
    today = now_ms()
    events = [payload(served("ann", today - day * DAY_MS, event_id=f"s{day}")) for day in range(1, 41)]
    for day in range(1, 41):
        action = "completed" if day % 3 else "dismissed"
        shown = feedback(
            "ann" if day % 2 else "bob", today - day * DAY_MS, action, dwell_ms=day * 100, event_id=f"f{day}"
        )
        events.append(payload(shown))
    assert migrated("events", write_events(tmp_path / "events.ndjson", *events)).code == 0
    return migrated


def test_features_are_listed_for_people_and_for_programs(profiles: Run) -> None:
    table = profiles("features")
    assert all(f" {entry.name} " in table.out and entry.description in table.out for entry in REGISTRY)
    listed = profiles("features", "--format", "json").json["features"]
    assert [one["name"] for one in listed] == list(REGISTRY.names)
    assert listed[0].keys() == {
        *("name", "dtype", "ttl_s", "window_s", "default", "description", "invalidated_by", "relations", "fingerprint"),
    }


def test_the_json_schema_names_every_feature_with_its_type(profiles: Run) -> None:
    schema = profiles("features", "--format", "json-schema").json
    properties = schema["$defs"][ProfileFeatures.__name__]["properties"]
    assert list(properties) == list(REGISTRY.names)
    kinds = {"float": "number", "int": "integer", "str": "string"}
    for entry in REGISTRY:
        text = json.dumps(properties[entry.name])
        assert f'"type": "{kinds[entry.dtype]}"' in text
        assert '"type": "null"' in text
        assert json.dumps(entry.description) in text


def test_the_python_export_compiles_and_has_every_feature(profiles: Run) -> None:
    source = profiles("features", "--format", "python").out
    namespace: dict[str, Any] = {}
    exec(compile(source, "export", "exec", dont_inherit=True), namespace)  # noqa: S102  # our own export
    exported = namespace[ProfileFeatures.__name__]
    check_mirror(REGISTRY, exported)
    assert {name: get_args(hint)[0] for name, hint in get_type_hints(exported).items()} == {
        entry.name: DTYPES[entry.dtype] for entry in REGISTRY
    }
    formatted = [str(Path(sys.executable).with_name("ruff")), "format", "--line-length=120", "--check", "--quiet", "-"]
    assert subprocess.run(formatted, input=source, text=True, check=False).returncode == 0


def test_the_typescript_export_has_every_feature(profiles: Run) -> None:
    source = profiles("features", "--format", "typescript").out
    found = dict(re.findall(r"^  (\w+)\?: (\w+) \| null;$", source, re.MULTILINE))
    assert found == {entry.name: TYPESCRIPT[entry.dtype] for entry in REGISTRY}
    assert source.count("export interface") == 1


def test_an_export_format_is_refused_when_it_is_unknown(profiles: Run) -> None:
    shown = profiles("features", "--format", "xml")
    assert shown.code == 2
    assert all(name in shown.err for name in FORMATS)


def test_a_profile_is_shown_when_the_user_is_known_and_when_not(lived_in: Run) -> None:
    found = lived_in("profile", "ann", "--json")
    assert found.json["user_id"] == "ann"
    assert found.json["features"]["tip_volume_30d"] == 29
    table = lived_in("profile", "ann").out
    assert re.search(r"tip_volume_30d .* 29 .* computed", table)
    assert lived_in("profile", "nobody", "--json").json["features"]["tip_volume_30d"] == 0


def test_a_profile_is_shown_as_it_was_when_a_moment_is_named(lived_in: Run) -> None:
    moment = rfc3339(now_ms() - 5 * DAY_MS)
    then = lived_in("profile", "ann", "--json", "--as-of", moment).json["features"]
    assert then["tip_volume_30d"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b"], "user_id: must not contain /"),
        ([".."], "user_id: must not be . or .."),
        (["ann", "--as-of", "yesterday"], "--as-of: 'yesterday' is no time; write 2026-04-25T08:30:00+02:00"),
        (["ann", "--as-of", "2026-04-25T08:30:00"], "--as-of: '2026-04-25T08:30:00' lacks its UTC offset"),
        (["ann", "--as-of", "2999-01-01T00:00:00Z"], "--as-of: lies in the future"),
        (
            ["ann", "--as-of", "2001-01-01T00:00:00Z"],
            "--as-of: reaches back beyond kept history; the earliest possible",
        ),
    ],
)
def test_a_profile_is_refused_when_an_argument_is_wrong(migrated: Run, arguments: list[str], message: str) -> None:
    shown = migrated("profile", *arguments)
    assert shown.code == 5
    assert message in shown.err


def moments(count: int) -> list[tuple[str, str]]:
    """Users and moments of a training set."""
    start = now_ms() - 20 * DAY_MS
    return [("ann" if n % 2 else "bob", rfc3339(start + n * DAY_MS // 3)) for n in range(count)]


def expected(profiles: Run, rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Each row as `profile --as-of` says, which is what GET says."""
    return [
        {
            "user_id": user,
            "as_of": moment,
            **profiles("profile", user, "--json", "--as-of", moment).json["features"],
        }
        for user, moment in rows
    ]


def typed(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV training set with their types."""
    found: list[dict[str, Any]] = []
    for row in csv.DictReader(StringIO(text)):
        values = {entry.name: DTYPES[entry.dtype](row[entry.name]) if row[entry.name] else None for entry in REGISTRY}
        found.append({"user_id": row["user_id"], "as_of": row["as_of"], **values})
    return found


def test_history_equals_the_profile_at_each_moment_when_written_as_csv_and_parquet(
    lived_in: Run, tmp_path: Path
) -> None:
    rows = moments(9)
    (tmp_path / "rows.csv").write_text("user_id,as_of\n" + "".join(f"{user},{at}\n" for user, at in rows))
    (tmp_path / "rows.ndjson").write_text("".join(json.dumps({"user_id": u, "as_of": a}) + "\n\n" for u, a in rows))
    truth = expected(lived_in, rows)
    assert len({json.dumps(row) for row in truth}) == len(rows)

    assert typed(lived_in("history", "rows.csv").out) == truth
    shown = lived_in("history", "rows.ndjson", "--output", "set.csv")
    assert (shown.code, shown.out, shown.err) == (0, "", "9 rows written to set.csv\n")
    assert typed((tmp_path / "set.csv").read_text()) == truth
    assert lived_in("history", "rows.csv", "--output", "set.parquet").code == 0
    assert pq.read_table(tmp_path / "set.parquet").to_pylist() == truth


def test_history_leaves_out_what_arrived_later_when_told_so(lived_in: Run, tmp_path: Path) -> None:
    """Everything was loaded a moment ago: at no row's own moment was anything known."""
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\nann,{rfc3339(now_ms() - DAY_MS)}\n")
    (known,) = typed(lived_in("history", "rows.csv", "--known-at", "as_of").out)
    assert known["tip_volume_30d"] == 0
    (whole,) = typed(lived_in("history", "rows.csv", "--known-at", rfc3339(now_ms())).out)
    assert whole["tip_volume_30d"] == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id,as_of\nann,{now}\n\nbob,soon\n", "line 4, as_of: 'soon' is no time"),
        ("user_id,as_of\nann,{now}\nbob,\n", "line 3, as_of: missing, or not text"),
        ('user_id,as_of,note\nann,{now},"two\nlines"\n,{now},x\n', "line 4, user_id: missing, or not text"),
        ('user_id,as_of,note\nann,{now},x\n..,{now},"two\nlines"\n', "line 3, user_id: must not be . or .."),
        ("user_id,as_of\nann,{now}\nbob,2999-01-01T00:00:00Z\n", "line 3, as_of: lies in the future"),
        ("user_id,as_of\nann,2001-01-01T00:00:00Z\n", "line 2, as_of: reaches back beyond kept history"),
        ("who,when\nann,{now}\n", "line 2, user_id: missing, or not text"),
        ('{{"user_id": "ann", "as_of": "{now}"}}\n\n{{"user_id": 7, "as_of": "{now}"}}\n', "line 3, user_id: missing"),
        ('{{"user_id": "ann", "as_of": "{now}"}}\n{{"user_id"\n', "line 2: not JSON"),
        ('{{"user_id": "ann", "as_of": "{now}"}}\n[1]\n', "line 2, user_id: missing"),
    ],
)
def test_history_names_the_line_when_a_row_is_wrong(lived_in: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows").write_text(text.format(now=rfc3339(now_ms())))
    shown = lived_in("history", "rows", "--output", "set.csv")
    assert shown.code == 5
    assert message in shown.err
    assert not (tmp_path / "set.csv").exists()


def test_history_takes_a_file_as_spreadsheets_write_it(lived_in: Run, tmp_path: Path) -> None:
    rows = f"\ufeffuser_id,as_of,label\r\nann,{rfc3339(now_ms())},1\r\n"
    (tmp_path / "rows.csv").write_bytes(rows.encode())
    assert len(typed(lived_in("history", "rows.csv").out)) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.csv"], 2, "'missing.csv' does not exist"),
        (["rows.csv", "--output", "set.xlsx"], 5, "the name must end in .csv or .parquet"),
        (["rows.csv", "--output", "no/such/set.csv"], 4, "cannot write no/such/set.csv"),
        (["rows.csv", "--known-at", "later"], 5, "--known-at: 'later' is no time"),
        (["latin1.csv"], 5, "latin1.csv is not UTF-8 text"),
    ],
)
def test_history_says_what_is_wrong_when_it_cannot_begin(
    migrated: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "rows.csv").write_text("user_id,as_of\n")
    (tmp_path / "latin1.csv").write_bytes("user_id,as_of\nzoë,x\n".encode("latin-1"))
    shown: Outcome = migrated("history", *arguments)
    assert (shown.code, message in shown.err) == (code, True), shown.err


def test_moments_are_written_as_the_service_writes_them(lived_in: Run, tmp_path: Path) -> None:
    local = datetime.fromtimestamp(now_ms() / 1000 - 60).astimezone().isoformat()
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\nann,{local}\n")
    (row,) = typed(lived_in("history", "rows.csv").out)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["as_of"])
