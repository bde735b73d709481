"""`profiles backup`, `profiles restore` and `profiles adopt`."""

from __future__ import annotations

from pathlib import Path

import click

from app.cli.output import progress, say, settings_from_environment, stop_on_sigterm


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(file: Path) -> None:
    """Copy the database to FILE, consistent as of one moment, while the service runs."""
    from app.stores.sqlite import backup as store

    settings = settings_from_environment()
    stop_on_sigterm()
    with progress("pages") as bar:
        task = bar.add_task("copying", total=None)
        store.backup(settings.database, file, lambda left, total: bar.update(task, total=total, completed=total - left))
    say(f"{settings.database} backed up to {file}")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.confirmation_option(prompt="This replaces the database. Go on?")
def restore(file: Path) -> None:
    """Put the backup FILE in the place of the database. Stop the service first.

    Nothing cached from the replaced database can be read afterwards, even where the cache was not emptied.
    """
    from app.stores.sqlite import backup as store

    settings = settings_from_environment()
    stop_on_sigterm()
    store.restore(file, settings.database)
    say(f"{settings.database} restored from {file}")


@click.command()
def adopt() -> None:
    """Give the database a new id: nothing that was cached before is read any more. Stop the service first.

    A copy of the file gets a new id by itself. This is for what cannot be noticed, as a clone of a whole volume: two
    services with databases of one id and one cache would answer with each other's values.
    """
    from app.stores.sqlite import backup as store

    settings = settings_from_environment()
    store.adopt(settings.database)
    say(f"{settings.database} has a new id")
