"""`profiles backup` and `profiles restore`."""

from __future__ import annotations

from pathlib import Path

import click

from app.commands.output import progress, settings_from_environment


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(file: Path) -> None:
    """Copy the database to FILE, consistent as of one moment, while the service runs."""
    from app.stores.sqlite import backup as store

    settings = settings_from_environment()
    with progress("pages") as bar:
        task = bar.add_task("copying", total=None)
        store.backup(settings.database, file, lambda left, total: bar.update(task, total=total, completed=total - left))
    click.echo(f"{settings.database} backed up to {file}", err=True)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.confirmation_option(prompt="This replaces the database. Go on?")
def restore(file: Path) -> None:
    """Put the backup FILE in the place of the database. Stop the service first.

    Nothing cached from the replaced database can be read afterwards, even where the cache was not emptied.
    """
    from app.stores.sqlite import backup as store

    settings = settings_from_environment()
    store.restore(file, settings.database)
    click.echo(f"{settings.database} restored from {file}", err=True)
