"""Commands on a PostgreSQL database."""

from pathlib import Path

import pytest

from app.settings.parsers import PostgresUrl
from app.stores.sql.database import SCHEMA_REVISION
from tests.integration.cli.conftest import Run
from tests.support.postgres import drop_tables


def test_database_is_migrated(profiles: Run, postgres_url: PostgresUrl, tmp_path: Path) -> None:
    drop_tables(postgres_url)
    first = profiles("migrate", "--json", database=postgres_url.url)
    assert first.json == {"database": str(postgres_url), "from": None, "to": SCHEMA_REVISION}
    again = profiles("migrate", database=postgres_url.url)
    assert (again.code, again.err) == (0, f"{postgres_url} is already at revision {SCHEMA_REVISION}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("backup", "copy"), "back it up with pg_dump or pg_basebackup"),
        (("restore", "--yes", "old"), "restore it with pg_restore or from a base backup"),
        (("adopt",), "is noticed"),
    ],
    ids=lambda value: value[0],
)
def test_command_on_a_file_says_what_to_use_instead(
    profiles: Run, tmp_path: Path, arguments: tuple[str, ...], advice: str
) -> None:
    (tmp_path / "old").touch()
    shown = profiles(*arguments, database="postgresql://me:secret@127.0.0.1:1/x")
    assert shown.code == 2
    assert "PROFILES_DATABASE: names a PostgreSQL database; " in shown.err
    assert advice in shown.err
    assert [item.name for item in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("arguments", [("migrate",), ("doctor",)], ids=lambda value: value[0])
def test_password_is_not_shown_when_the_server_is_away(profiles: Run, arguments: tuple[str, ...]) -> None:
    shown = profiles(*arguments, database="postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2")
    assert shown.code in (1, 4)
    assert "postgresql://me@127.0.0.1:1/x" in shown.out + shown.err
    assert "secret" not in shown.out + shown.err


def test_deployment_is_diagnosed(profiles: Run, postgres_url: PostgresUrl) -> None:
    lines = {line["check"]: line for line in profiles("doctor", "--json", database=postgres_url.url).json}
    assert lines["database"]["state"] == "ok"
    assert lines["durability"]["state"] == "bad", "the server of the tests is not durable"
    assert {"outbox", "open files", "registry", "cache"} < lines.keys()
    assert not {"wal", "file system", "disk space", "sqlite"} & lines.keys()
