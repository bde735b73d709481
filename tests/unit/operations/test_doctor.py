"""Diagnoses that real servers of a test cannot cause: old releases, failing disks, mixed registries."""

import pytest

from app.operations.component_states import OK, ComponentView
from app.operations.doctor import diagnose_features, diagnose_registry
from app.stores.sqlite.diagnostics import diagnose_space, diagnose_sqlite
from app.stores.valkey.diagnostics import diagnose_persistence, diagnose_release
from tests.support.samples import sample

GIB = 2**30


@pytest.mark.parametrize(("version", "state"), [("7.0", "ok"), ("9.1.0", "ok"), ("6.2.14", "bad")])
def test_release_of_a_server_must_be_new_enough(version: str, state: str) -> None:
    assert diagnose_release("cache", {"redis_version": version}).state == state
    assert diagnose_release("queue", {"redis_version": "7.2.4", "valkey_version": version}).state == state


def test_persistence_is_bad_when_the_server_reports_errors() -> None:
    assert diagnose_persistence({"aof_enabled": 1, "aof_last_write_status": "err"}, None).state == "bad"
    assert diagnose_persistence({"rdb_last_bgsave_status": "err"}, True).state == "bad"
    assert "unknown" in diagnose_persistence({}, None).text


@pytest.mark.parametrize(
    ("version", "state"),
    [
        *(((3, 51, 3), "ok"), ((3, 52, 0), "ok"), ((3, 50, 7), "ok"), ((3, 44, 6), "ok")),
        *(((3, 51, 2), "warn"), ((3, 50, 6), "warn"), ((3, 44, 5), "warn"), ((3, 45, 9), "warn"), ((3, 40, 1), "warn")),
    ],
)
def test_release_of_sqlite_must_have_the_fix_of_its_branch(version: tuple[int, ...], state: str) -> None:
    assert diagnose_sqlite(version).state == state


@pytest.mark.parametrize(
    ("free", "database", "state"),
    [(100 * GIB, GIB, "ok"), (GIB // 2, 0, "warn"), (10 * GIB, 11 * GIB, "warn"), (50 * 2**20, 0, "bad")],
)
def test_space_must_hold_growth_and_a_backup(free: int, database: int, state: str) -> None:
    assert diagnose_space(free, 200 * GIB, database).state == state


WELL, BROKEN = (
    sample(components={"features": OK}),
    sample(process="two", components={"features": ComponentView("degraded", "a fails")}),
)


def test_features_are_bad_when_failing_and_warn_when_disabled() -> None:
    assert diagnose_features([], {}).state == diagnose_features([WELL, sample()], {}).state == "ok"
    off = diagnose_features([WELL], {"b": "disabled by ann: slow"})
    assert off.state == "warn"
    assert off.text.startswith("b is disabled by ann: slow")
    bad = diagnose_features([BROKEN, WELL, BROKEN], {"b": "disabled by ann: slow"})
    assert (bad.state, bad.text) == ("bad", "a fails; b is disabled by ann: slow")


def test_registry_warns_when_processes_serve_another_one() -> None:
    running = [sample(registry="1a"), sample(process="two", registry="1a"), sample(process="old")]
    assert diagnose_registry("1a", []).state == diagnose_registry("1a", running).state == "ok"
    assert diagnose_registry("1a", [sample()]).state == "ok"
    differs = diagnose_registry("2b", running)
    assert differs.state == "warn"
    assert "1a" in differs.text
    assert "2b" in differs.text
    mixed = diagnose_registry("1a", [*running, sample(process="w", role="worker", registry="2b")])
    assert mixed.state == "warn"
    assert mixed.text.startswith("running processes serve different registries: 1a by API process one, ")
