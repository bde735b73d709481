"""What no real server or file of a test can show: old releases, clocks that differ, disks that fail."""

from __future__ import annotations

import pytest

from app.operations.doctor.database import diagnose_machine, diagnose_sqlite
from app.operations.doctor.facts import MachineFacts, ServerFacts
from app.operations.doctor.features import diagnose_features, diagnose_registry
from app.operations.doctor.servers import diagnose_cache, diagnose_queue
from app.operations.states import OK, ComponentView
from tests.operations.samples import sample

GIB = 2**30
SERVER = ServerFacts(
    flavour="Redis",
    version=(7, 0, 15),
    run_id="a",
    role="master",
    maxmemory=GIB,
    policy="allkeys-lru",
    appends=True,
    snapshots=True,
    write_error=None,
    refuses=None,
    ahead_ms=3,
    unsure_ms=2,
    worker_alive=True,
    databases=1,
)
MACHINE = MachineFacts("ext4", "/", 100 * GIB, 200 * GIB, 65_536, (3, 51, 3))


def server(check: str, **changes: object) -> tuple[str, str]:
    """State and text of a line about a cache or a queue."""
    facts = SERVER._replace(**changes)  # type: ignore[arg-type]  # by name
    (line,) = (line for line in {*diagnose_cache(facts), *diagnose_queue(facts)} if line.check == check)
    return line.state, line.text


@pytest.mark.parametrize(("version", "state"), [((7, 0), "ok"), ((9, 1, 0), "ok"), ((6, 2, 14), "bad")])
def test_release_of_a_server_must_be_new_enough(version: tuple[int, ...], state: str) -> None:
    assert server("cache", version=version)[0] == server("queue", version=version)[0] == state


@pytest.mark.parametrize(
    ("ahead_ms", "state", "text"),
    [
        (0, "ok", "agrees with ours"),
        (-900, "ok", "agrees with ours"),
        (2_502, "warn", "2.5 s ahead of ours"),
        (-2_502, "warn", "2.5 s behind ours"),
        (400_000, "bad", "400.0 s ahead of ours"),
    ],
)
def test_clock_of_a_server_must_agree_with_ours(ahead_ms: int, state: str, text: str) -> None:
    found = server("queue clock", ahead_ms=ahead_ms)
    assert found[0] == state
    assert text in found[1]


def test_clock_is_no_fault_when_the_answer_took_long() -> None:
    assert server("cache clock", ahead_ms=2_500, unsure_ms=2_000)[0] == "ok"


def test_persistence_is_bad_when_the_server_says_that_it_fails() -> None:
    assert server("queue persistence", write_error="the last snapshot failed")[0] == "bad"
    assert "does not say" in server("queue persistence", appends=False, snapshots=None)[1]


@pytest.mark.parametrize(
    ("version", "state"),
    [
        *(((3, 51, 3), "ok"), ((3, 52, 0), "ok"), ((3, 50, 7), "ok"), ((3, 44, 6), "ok")),
        *(((3, 51, 2), "warn"), ((3, 50, 6), "warn"), ((3, 44, 5), "warn"), ((3, 45, 9), "warn"), ((3, 40, 1), "warn")),
    ],
)
def test_release_of_sqlite_is_known_by_where_its_defect_was_mended(version: tuple[int, ...], state: str) -> None:
    assert diagnose_sqlite(version).state == state


@pytest.mark.parametrize(
    ("free", "database", "state"),
    [(100 * GIB, GIB, "ok"), (GIB // 2, 0, "warn"), (10 * GIB, 11 * GIB, "warn"), (50 * 2**20, 0, "bad")],
)
def test_space_must_hold_growth_and_a_backup(free: int, database: int, state: str) -> None:
    lines = {line.check: line.state for line in diagnose_machine(MACHINE._replace(free_bytes=free), database)}
    assert lines["disk space"] == state


WELL, BROKEN = (
    sample(looks={"features": OK}),
    sample(process="two", looks={"features": ComponentView("degraded", "a fails")}),
)


def test_features_are_bad_when_one_fails_and_to_look_at_when_one_is_disabled() -> None:
    assert diagnose_features([], {}).state == diagnose_features([WELL, sample()], {}).state == "ok"
    off = diagnose_features([WELL], {"b": "disabled by ann: slow"})
    assert (off.state, off.text) == ("warn", "b is disabled by ann: slow; it is answered as null")
    bad = diagnose_features([BROKEN, WELL, BROKEN], {"b": "disabled by ann: slow"})
    assert (bad.state, bad.text) == ("bad", "a fails; b is disabled by ann: slow")


def test_registry_is_to_look_at_when_running_processes_serve_another_one_or_several() -> None:
    running = [sample(registry="1a"), sample(process="two", registry="1a"), sample(process="old")]
    assert diagnose_registry("1a", []).state == diagnose_registry("1a", running).state == "ok"
    assert diagnose_registry("1a", [sample()]).state == "ok"
    differs = diagnose_registry("2b", running)
    assert (differs.state, differs.text) == (
        "warn",
        "running processes serve the registry 1a, and these settings name 2b",
    )
    mixed = diagnose_registry("1a", [*running, sample(process="w", role="worker", registry="2b")])
    assert mixed.state == "warn"
    assert mixed.text.startswith("running processes serve different registries: 1a by API process one, ")
