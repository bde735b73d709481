"""Every command opens exactly the file that it is given, whatever its name, or says why it does not."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Run
from tests.support.database import copy_database

NAMES = [
    *("b%31.db", "//p.db", "file:p.db?mode=memory", ":memory:", "-x.db"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("b#1.db", "a?b/p.db", "a b.db", "ä'\"&=.db")),
]


def users(path: Path) -> int:
    """How many users a database has; it is copied to a plain name first."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    with closing(sqlite3.connect(copy)) as connection:
        (count,) = connection.execute("SELECT COUNT(DISTINCT user_id) FROM event_log").fetchone()
    copy.unlink()
    return int(count)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_database_is_the_named_file(profiles: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m" / name.lstrip("/")
    named = f"m/{name}" if not name.startswith("//") else f"/{path}"
    path.parent.mkdir(parents=True)
    assert profiles("migrate", database=named).code == 0
    assert path.is_file()
    assert profiles("demo", "--users", "3", "--days", "2", database=named).code == 0
    assert profiles("doctor", "--full", "--json", database=named).json[0]["state"] == "ok"
    assert profiles("profile", "user-0001", "--json", database=named).code == 0
    assert [item for item in tmp_path.rglob("*") if item.is_file() and item.parent != path.parent] == []


@pytest.mark.parametrize("name", NAMES)
def test_backup_and_restore_take_the_named_file(
    profiles: Run, tmp_path: Path, migrated_template: Path, forty_days_template: Path, name: str
) -> None:
    decoy, path = tmp_path / "b1.db", tmp_path / name.lstrip("/")
    named = str(path) if not name.startswith("//") else f"/{path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    copy_database(forty_days_template, decoy, "two users")
    assert profiles("backup", named, database=decoy).code == 0
    assert users(path) == 2
    copy_database(migrated_template, decoy, "no users")
    assert profiles("restore", "--yes", named, database=tmp_path / "new.db").code == 0
    assert users(tmp_path / "new.db") == 2
    assert profiles("restore", "--yes", str(decoy), database=path.with_name(path.name + "2")).code == 0
    assert users(path.with_name(path.name + "2")) == 0


def test_tilde_is_the_home_directory(profiles: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert profiles("migrate", database="~/p.db").code == 0
    assert (tmp_path / "home" / "p.db").is_file()


@pytest.mark.parametrize("url", ["mysql://h/db", "sqlite:///p.db", "POSTGRES://u:p@h/db"])
def test_url_is_refused(profiles: Run, tmp_path: Path, url: str) -> None:
    shown = profiles("migrate", database=url)
    assert shown.code == 2
    assert "PROFILES_DATABASE" in shown.err
    assert "must be the path of a SQLite file" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_directory_is_refused(profiles: Run, tmp_path: Path) -> None:
    for command in ("migrate", "profile ann", "doctor"):
        shown = profiles(*command.split(), database=tmp_path)
        assert shown.code == 2
        assert "PROFILES_DATABASE: must be the path of a file, and is a directory" in shown.err


def test_wal_lies_beside_the_target_of_a_link(profiles: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    assert profiles("migrate", database=tmp_path / "disk" / "p.db").code == 0
    (tmp_path / "link.db").symlink_to(tmp_path / "disk" / "p.db")
    assert profiles("demo", "--users", "3", "--days", "2", database="link.db").code == 0
    assert profiles("backup", "b.db", database="link.db").code == 0
    assert profiles("restore", "--yes", "b.db", database="link.db").code == 0
    assert (tmp_path / "link.db").is_symlink()
    assert {item.name for item in tmp_path.iterdir()} >= {"disk", "link.db", "b.db"}


def test_database_is_adopted_by_name(profiles: Run) -> None:
    assert profiles("migrate", database="b%31.db").code == 0
    shown = profiles("adopt", database="b%31.db")
    assert (shown.code, shown.err) == (0, "b%31.db has a new id\n")
    assert profiles("adopt", database="absent.db").code == 4
