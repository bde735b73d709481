"""`profiles backup`, `profiles restore` and `profiles adopt`: copies of the database."""

from __future__ import annotations

from pathlib import Path

import click

from app.cli.common import progress, say, settings_from_environment, stop_on_sigterm


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(file: Path) -> None:
    """Copy the database to FILE. The service may be running; the copy is consistent."""
    from app.stores.sqlite import backup as store

    database = settings_from_environment().require_file("back it up with pg_dump or pg_basebackup")
    stop_on_sigterm()
    with progress("pages") as bar:
        task = bar.add_task("copying", total=None)
        store.backup(database, file, lambda left, total: bar.update(task, total=total, completed=total - left))
    say(f"{database} backed up to {file}")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.confirmation_option(prompt="This replaces the database. Continue?")
def restore(file: Path) -> None:
    """Replace the database with the backup FILE. Stop the service first.

    Values cached from the replaced database are never served afterwards, even if the cache is not emptied.
    """
    from app.stores.sqlite import backup as store

    database = settings_from_environment().require_file("restore it with pg_restore or from a base backup")
    stop_on_sigterm()
    store.restore(file, database)
    say(f"{database} restored from {file}")


@click.command()
def adopt() -> None:
    """Give the database a new id. Stop the service first.

    Values cached under the old id are never served. A copy of the file gets a new id automatically, but a clone of a
    whole volume does not: two services that share a cache and whose databases have the same id would serve each other's
    values.
    """
    from app.stores.sqlite import backup as store

    database = settings_from_environment().require_file(
        "a server with another system identifier or timeline is noticed, and the service uses no value cached before"
    )
    store.adopt(database)
    say(f"{database} has a new id")
