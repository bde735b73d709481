"""`profiles features …`: what is served; writing, testing and changing a definition; switching a feature off and on."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.bootstrap.engines import load_contract
from app.cli import common
from app.features.plan import definitions_of
from app.operations.samples import Sample
from app.settings import Settings
from app.stores.sql.registries import SqlRegistries
from app.stores.sql.samples import SqlSamples
from app.stores.sqlite.database import SqliteDatabase
from tests.integration.cli.conftest import Run, rows_shown
from tests.support.entries import COUNT_VIEWS
from tests.support.events import payload
from tests.support.events import served as tip_served
from tests.support.registry import FEATURES, REGISTRY, own_entry, own_registry
from tests.support.traffic import now_ms

COUNT_TIPS = "SELECT user_id, COUNT(DISTINCT tip_id) AS value FROM views GROUP BY user_id"
OVERFLOW = "SELECT user_id, SUM(9223372036854775807) AS value FROM views GROUP BY user_id"
EXAMPLES = "examples=[Example(events=[served(), served()], value={value})]"


@pytest.fixture
def populated(migrated: Run, tmp_path: Path) -> Run:
    """Two users: ann was served a tip twice, bob two tips once each."""
    now = now_ms()
    pairs = [("ann", "t"), ("ann", "t"), ("bob", "u"), ("bob", "v")]
    events = [tip_served(user, now - 1_000, tip_id=tip) for user, tip in pairs]
    (tmp_path / "events").write_text("\n".join(json.dumps(payload(event)) for event in events))
    assert migrated("events", "events").code == 0
    return migrated


def serve(tmp_path: Path, *sources: str, running: bool = False) -> None:
    """Processes have served these registries, one after the other; or run now."""

    async def announce() -> None:
        database = await SqliteDatabase.open(tmp_path / "var/profiles.db", 1)
        try:
            for number, source in enumerate(sources):
                registry = load_contract(Settings(features=source)).registry
                at_ms = now_ms() - 5_000 + number
                await SqlRegistries(database).announce(registry, at_ms)
                if running:
                    sample = Sample(
                        at_ms=at_ms, process=f"p{number}", role="api", seconds=1.0, registry=registry.fingerprint
                    )
                    await SqlSamples(database).keep(sample)
        finally:
            await database.close()

    asyncio.run(announce())


def dump(tmp_path: Path) -> list[str]:
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection:
        return list(connection.iterdump())


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[None]:
    """The test must leave the database as it is once it calls for this; asked for last."""
    before = dump(tmp_path)
    yield
    assert dump(tmp_path) == before


# --- what is served


def test_names_are_whole_when_the_terminal_is_narrow(
    profiles: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common.out(), "width", 80)
    shown = profiles("features").out
    for name in REGISTRY.names:
        assert f" {name} " in shown
    assert "30 days" in shown
    assert "6 hours" in shown
    assert "0:00:00" not in shown


def test_registry_option_is_accepted_anywhere(profiles: Run, tmp_path: Path) -> None:
    own = own_registry(tmp_path / "own.py", own_entry())
    for arguments in (["features", "--registry", own], ["features", "--registry", own, "test"]):
        assert "probe" in profiles(*arguments).out
    assert profiles("features", "--registry", FEATURES, "test", "--registry", own).out == "probe: no examples\n"
    wrong = profiles("features", "--registry", "own.py")
    assert (wrong.code, "must be package.module:NAME or /path/features.py:NAME" in wrong.err) == (2, True)


def test_mirror_is_printed_when_it_disagrees(profiles: Run, tmp_path: Path) -> None:
    own = own_registry(tmp_path / "own.py", own_entry())
    path = tmp_path / "own.py"
    module = path.read_text()
    path.write_text(module + "\nfrom msgspec import Struct\nclass ProfileFeatures(Struct):\n    other: int = 0\n")
    shown = profiles("features", features=own)
    assert (shown.code, "'other': it is in the mirror" in shown.err) == (2, True)
    path.write_text(profiles("features", "--format", "python", features=own).out + module)
    assert profiles("features", features=own).code == 0


def test_what_a_registry_prints_is_no_output(profiles: Run, tmp_path: Path) -> None:
    module = own_registry(tmp_path / "own.py", own_entry("widgets"))
    with (tmp_path / "own.py").open("a") as file:
        file.write("\nprint('loaded')\n")
    shown = profiles("features", "--format", "json", "--registry", module)
    assert [entry["name"] for entry in shown.json["features"]] == ["widgets"]
    assert shown.err == "loaded\n"


def test_one_line_names_a_registry_that_cannot_be_loaded(profiles: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("x = 1\nraise ValueError('a\\nb')\n")
    for command in (["features"], ["features", "test"], ["features", "plan"], ["profile", "ann"]):
        shown = profiles(*command, features="own.py:REGISTRY")
        assert (shown.code, shown.out) == (2, "")
        assert shown.err == (
            f"error: PROFILES_FEATURES: cannot load own.py: ValueError: a b ({tmp_path}/own.py, line 2)\n"
        )


# --- new


def test_new_prints_a_complete_module(profiles: Run, tmp_path: Path) -> None:
    arguments = ("--from", "feedback", "--dtype", "float", "--window", "7d", "--ttl", "30m")
    (tmp_path / "own.py").write_text(profiles("features", "new", "snooze_rate_7d", *arguments).out)
    assert profiles("features", "test", features="own.py:REGISTRY").out == "snooze_rate_7d: 1 example ok\n"
    (found,) = profiles("features", "--format", "json", features="own.py:REGISTRY").json["features"]
    assert (found["window_s"], found["ttl_s"], found["relations"]) == (7 * 86_400, 1_800, ["feedback"])


def test_new_is_refused_when_an_argument_is_wrong(profiles: Run) -> None:
    whole = "'--window': must be a whole number"
    cases: list[tuple[str, dict[str, str], str]] = [
        ("a-b", {}, "the name must be an ASCII identifier"),
        ("class", {}, "no keyword of Python"),
        ("x", {"window": "7"}, f"{whole} of days, hours or minutes, such as 7d, 12h or 30m"),
        *(("x", {"window": window}, whole) for window in ("0d", "7w", "-1d", "1234567d")),
        ("x", {"ttl": "soon"}, "'--ttl': must be a whole number"),
        ("x", {"dtype": "bool"}, "'bool' is not one of 'float', 'int', 'str'"),
        ("x", {"from": "clicks"}, "'clicks' is not one of 'feedback', 'views'"),
    ]
    for name, changes, message in cases:
        given = {"from": "views", "dtype": "int", "window": "7d", **changes}
        options = [part for option, value in given.items() for part in (f"--{option}", value)]
        shown = profiles("features", "new", name, *options)
        assert (shown.code, shown.out, message in shown.err) == (2, "", True), shown.err


# --- test


def test_failing_examples_are_shown(profiles: Run, tmp_path: Path) -> None:
    own = own_registry(
        tmp_path / "own.py",
        own_entry("good", more=EXAMPLES.format(value=2)),
        own_entry("bad", more=EXAMPLES.format(value=3)),
        own_entry("bare"),
    )
    shown = profiles("features", "test", features=own)
    assert (shown.code, shown.out) == (
        1,
        "good: 1 example ok\nbad: 1 example, 1 FAILED\n  example 1: expected 3, computed 2\nbare: no examples\n",
    )
    assert profiles("features", "test", "good", "bare", features=own).code == 0
    assert profiles("features", "test", "bad", "--json", features=own).json == [
        {"feature": "bad", "examples": 1, "failures": ["example 1: expected 3, computed 2"]}
    ]
    unknown = profiles("features", "test", "worse", features=own)
    assert (unknown.code, "unknown feature 'worse'; known are good, bad, bare" in unknown.err) == (5, True)


# --- plan


def test_every_feature_is_new_when_nothing_was_served(populated: Run, unchanged: None) -> None:
    shown = populated("features", "plan")
    assert shown.code == 0
    assert rows_shown(shown.out)["compared with"] == "none"
    assert (
        "feature tip_volume_30d, change added, details none, breaks no, recomputed users 2, us per user " in shown.out
    )


def test_plan_says_so_when_nothing_changes(populated: Run, tmp_path: Path) -> None:
    serve(tmp_path, FEATURES)
    shown = populated("features", "plan")
    assert (shown.code, rows_shown(shown.out)["changes"]) == (0, "none")
    two = [own_entry("one"), own_entry("two")]
    serve(tmp_path, own_registry(tmp_path / "own.py", *two))
    other = own_registry(tmp_path / "other.py", *reversed(two))
    rows = rows_shown(populated("features", "plan", features=other).out)
    assert (rows["changes"], rows["registry"] == rows["compared with"]) == ("none", False)


def test_plan_lists_changes_and_recomputed_users(populated: Run, tmp_path: Path) -> None:
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry("kept"), own_entry("changed"), own_entry("slower")))
    new = own_registry(
        tmp_path / "new.py",
        own_entry("kept"),
        own_entry("changed", COUNT_TIPS, days=7),
        own_entry("slower").replace("hours=1", "hours=2"),
        own_entry("added"),
    )
    before = dump(tmp_path)
    shown = populated("features", "plan", "--json", "--registry", new)
    assert dump(tmp_path) == before
    assert (shown.code, shown.json["breaks"], shown.json["also_running"]) == (0, False, [])
    changes = {item["feature"]: item for item in shown.json["changes"]}
    assert changes.keys() == {"changed", "slower", "added"}
    assert changes["changed"]["details"] == ["window: 30 days → 7 days", "SQL"]
    assert changes["slower"]["details"] == ["TTL: 1 hour → 2 hours"]
    assert [changes[name]["recomputed_users"] for name in ("changed", "slower", "added")] == [2, 0, 2]
    assert changes["added"]["us_per_user"] > 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([own_entry("other")], "feature probe, change removed, details none, breaks yes"),
        ([own_entry(dtype="float")], "feature probe, change changed, details dtype: int → float, breaks yes"),
        ([own_entry(compute=OVERFLOW)], "details SQL; fails: the SQL failed: integer overflow, breaks yes"),
        (
            [own_entry(compute="SELECT user_id, 0.5 AS value FROM views GROUP BY user_id")],
            "fails: the SQL gave float 0.5 where int is",
        ),
    ],
)
def test_plan_fails_when_a_change_breaks_readers(
    populated: Run, tmp_path: Path, entries: list[str], message: str
) -> None:
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry()))
    shown = populated("features", "plan", features=own_registry(tmp_path / "new.py", *entries))
    assert shown.code == 1
    assert message in shown.out


def test_plan_names_other_running_registries(populated: Run, tmp_path: Path) -> None:
    sources = [own_registry(tmp_path / f"{name}.py", own_entry(name)) for name in ("gone", "old", "new")]
    serve(tmp_path, sources[0])
    serve(tmp_path, *sources[1:], running=True)
    old, new = [load_contract(Settings(features=source)).registry.fingerprint for source in sources[1:]]
    shown = populated("features", "plan", features=sources[2])
    rows = rows_shown(shown.out)
    assert (rows["registry"], rows["compared with"], rows["also running"]) == (new, new, old)


def test_plan_is_refused_when_the_sql_does_not_compile(populated: Run, tmp_path: Path) -> None:
    sql = "SELECT user_id, x AS value FROM views"
    shown = populated("features", "plan", features=own_registry(tmp_path / "own.py", own_entry(compute=sql)))
    assert (shown.code, "error: feature 'probe': the SQL does not compile: no such column: x" in shown.err) == (2, True)


# --- diff


def test_diff_compares_with_the_definition_served_last(populated: Run, tmp_path: Path) -> None:
    serve(tmp_path, own_registry(tmp_path / "old.py", own_entry(compute=OVERFLOW)))
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry(compute=COUNT_VIEWS)))
    new = own_registry(tmp_path / "new.py", own_entry(compute=COUNT_TIPS))
    serve(tmp_path, new)
    before = dump(tmp_path)
    shown = populated("features", "diff", "probe", features=new)
    assert dump(tmp_path) == before
    assert shown.code == 0
    rows = rows_shown(shown.out)
    assert (rows["users"], rows["changed"], rows["changed share"]) == ("2", "1", "0.5")
    assert rows["why no psi"].startswith("too few users")
    assert rows["examples"] == "user id ann, before 2, after 1"
    as_json = populated("features", "diff", "probe", "--json", "--users", "1", features=new).json
    assert (as_json["users"], as_json["after"]["failed"]) == (1, 0)


def test_diff_shows_all_digits_of_large_values(populated: Run, tmp_path: Path) -> None:
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry(compute=COUNT_VIEWS)))
    large = own_entry(dtype="float", compute=COUNT_TIPS.replace("COUNT(DISTINCT tip_id)", "12345.6"))
    rows = rows_shown(populated("features", "diff", "probe", features=own_registry(tmp_path / "new.py", large)).out)
    assert rows["after: quartiles"] == "12,346; 12,346; 12,346"


def test_diff_counts_failures_of_a_disabled_feature(populated: Run, tmp_path: Path) -> None:
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry(compute=OVERFLOW)))
    latest = "SELECT user_id, MAX(tip_id) AS value FROM views GROUP BY user_id"
    new = own_registry(tmp_path / "new.py", own_entry(dtype="str", compute=latest))
    assert populated("features", "disable", "probe", features=new).code == 0
    rows = rows_shown(populated("features", "diff", "probe", features=new).out)
    assert (rows["before: nulls"], rows["before: failed"]) == ("0", "2")
    assert rows["why no psi"] == "the dtype changes from int to str"


def test_diff_says_so_when_there_are_no_users(migrated: Run, tmp_path: Path) -> None:
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry()))
    new = own_registry(tmp_path / "new.py", own_entry(compute=COUNT_TIPS))
    shown = migrated("features", "diff", "probe", features=new)
    assert (shown.code, rows_shown(shown.out)["users"]) == (0, "0")


def test_diff_is_refused_when_there_is_nothing_to_compare_with(migrated: Run, tmp_path: Path) -> None:
    own = own_registry(tmp_path / "own.py", own_entry())
    never = migrated("features", "diff", "probe", features=own)
    assert (never.code, never.err) == (5, "error: no process has served probe yet; nothing to compare\n")
    serve(tmp_path, own)
    same = migrated("features", "diff", "probe", features=own)
    assert (same.code, "probe was never served with another definition" in same.err) == (5, True)
    assert migrated("features", "diff", "other", features=own).code == 5


def test_diff_is_refused_when_the_old_sql_fails(migrated: Run, tmp_path: Path) -> None:
    own = own_registry(tmp_path / "own.py", own_entry())
    serve(tmp_path, own)
    (known,) = definitions_of(load_contract(Settings(features=own)).registry)
    body = json.dumps([{**_plain(known), "compute": "SELECT user_id, gone AS value FROM views", "fingerprint": "0"}])
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection, connection:
        connection.execute("UPDATE registries SET definitions = ?", (body,))
    shown = migrated("features", "diff", "probe", features=own)
    assert (shown.code, "can no longer be computed: feature 'probe': the SQL does not" in shown.err) == (5, True)


def _plain(definition: Any) -> dict[str, Any]:
    return {name: getattr(definition, name) for name in definition.__struct_fields__}


# --- disable and enable


def test_switching_is_written_to_the_audit_trail(migrated: Run, tmp_path: Path) -> None:
    shown = migrated("features", "disable", "preferred_hour", "--reason", "wrong hours")
    assert (shown.code, shown.out.startswith("preferred_hour is disabled: it is served as null")) == (0, True)
    assert "preferred_hour is null: disabled by the command line at " in migrated("profile", "ann").out
    again = migrated("features", "disable", "preferred_hour")
    assert (again.code, again.err) == (5, "error: preferred_hour is disabled already\n")
    assert migrated("features", "enable", "preferred_hour").out == "preferred_hour is enabled\n"
    again = migrated("features", "enable", "preferred_hour")
    assert (again.code, again.err) == (5, "error: preferred_hour is enabled already\n")
    with closing(sqlite3.connect(tmp_path / "var/profiles.db")) as connection:
        trail = connection.execute("SELECT actor, action, subject, outcome FROM audit_trail ORDER BY id").fetchall()
    assert trail == [
        (common.ACTOR, f"{action} feature", "preferred_hour", outcome)
        for action, outcome in [
            ("disable", "disabled: wrong hours"),
            ("disable", "refused: preferred_hour is disabled already"),
            ("enable", "enabled"),
            ("enable", "refused: preferred_hour is enabled already"),
        ]
    ]


def test_switching_is_refused_when_an_argument_is_wrong(migrated: Run) -> None:
    for arguments, message in [
        (["shoe_size"], "unknown feature 'shoe_size'; known are completion_rate_30d"),
        (["preferred_hour", "--reason", "x" * 401], "--reason: must be at most 400 characters, has 401"),
        (["preferred_hour", "--reason", "a\x1bb"], "--reason: must not contain control characters"),
    ]:
        for command in ("disable", "enable"):
            shown = migrated("features", command, *arguments)
            assert (shown.code, message in shown.err) == (5, True), shown.err


def test_feature_is_switched_when_the_registry_is_broken(migrated: Run, tmp_path: Path) -> None:
    serve(tmp_path, own_registry(tmp_path / "own.py", own_entry()))
    for source in ("missing.py:REGISTRY", FEATURES):
        assert migrated("features", "disable", "probe", features=source).code == 0
        assert migrated("features", "enable", "probe", features=source).code == 0
    assert migrated("features", "disable", "shoe_size", features="missing.py:REGISTRY").code == 2
