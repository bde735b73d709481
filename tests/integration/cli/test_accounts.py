"""Commands that run as an account that may read the database and not write to it."""

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Run
from tests.support.database import NOBODY, as_another_account, copy_database


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "ann"),
        ("audit", "ann"),
        ("features",),
        ("rollout", "status"),
        ("doctor",),
        ("backup", "../copy.db"),
        ("restore", "--yes", "../backup.db"),
        ("migrate",),
        ("adopt",),
        ("prune",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_of_another_account_leaves_no_files(
    profiles: Run,
    reachable: Path,
    migrated_template: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    database = reachable / "data" / "profiles.db"
    database.parent.mkdir()
    monkeypatch.chdir(database.parent)
    copy_database(migrated_template, database, "of the owner")
    shutil.copyfile(database, reachable / "backup.db")
    profiles(
        *arguments, database=database, features=""
    )  # so that everything is imported that another account may not look into
    (reachable / "copy.db").unlink(missing_ok=True)
    before = database.read_bytes()
    with as_another_account(database):
        shown = profiles(*arguments, database=database, features="")
    assert {file.name for file in database.parent.iterdir()} <= {"profiles.db", "profiles.db-reserve"}
    assert database.read_bytes() == before
    if arguments != ("features",):  # which looks at no database
        assert shown.code in (1, 4), shown
        assert "may not write to" in shown.out + shown.err
        assert "run the command as the owner of the database" in shown.out + shown.err


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another account")
@pytest.mark.parametrize("log", ["profiles.db-wal", "profiles.db-shm"])
def test_log_of_another_account_is_named(profiles: Run, reachable: Path, migrated_template: Path, log: str) -> None:
    database = copy_database(migrated_template, reachable / "profiles.db", "of the owner")
    assert profiles("profile", "ann", database=database, features="").code == 0
    (reachable / log).touch(0o644)
    os.chown(database, NOBODY, -1)
    with as_another_account(database):
        shown = profiles("profile", "ann", database=database, features="")
    assert shown.code == 4
    assert f"may not write to {reachable / log}, which belongs to root" in shown.err
    assert profiles("profile", "ann", database=database, features="").code == 0
