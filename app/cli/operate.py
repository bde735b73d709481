"""Commands that set up, check and maintain a deployment: migrate, backup, restore, adopt, prune, keys, doctor."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.common import (
    ACTOR,
    as_command,
    exit_on_signals,
    out,
    plain,
    progress,
    say,
    settings_of_command,
    show,
    with_service,
)
from app.cli.options import json_option
from app.errors import RegistryError, SettingsError
from app.features.clock import SystemClock
from app.settings import hash_key
from app.settings.parsers import SCOPES

if TYPE_CHECKING:
    from app.bootstrap.service import OpenService

COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@click.command()
@json_option
def migrate(as_json: bool) -> None:
    """Create the database, or migrate it to the schema revision of this program."""
    from app.stores.migrate import migrate as migrate_database

    database = settings_of_command().database
    before, after = migrate_database(database)
    if as_json:
        show({"database": str(database), "from": before, "to": after}, as_json)
    elif before == after:
        say(f"{database} is already at revision {after}")
    else:
        say(f"{database} migrated from {before or 'nothing'} to revision {after}")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(file: Path) -> None:
    """Copy the database to FILE. The service may be running; the copy is consistent."""
    from app.stores.sqlite import backup as store

    database = settings_of_command().require_file("back it up with pg_dump or pg_basebackup")
    exit_on_signals()
    with progress("copying", "pages") as update:
        store.backup(database, file, lambda left, total: update(total=total, completed=total - left))
    say(f"{database} backed up to {file}")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.confirmation_option(prompt="This replaces the database. Continue?")
def restore(file: Path) -> None:
    """Replace the database with the backup FILE. Stop the service first.

    Values cached from the replaced database are never served afterwards, even if the cache is not emptied.
    """
    from app.stores.sqlite import backup as store

    database = settings_of_command().require_file("restore it with pg_restore or from a base backup")
    exit_on_signals()
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

    database = settings_of_command().require_file(
        "a server with another system identifier or timeline is noticed, and the service uses no value cached before"
    )
    store.adopt(database)
    say(f"{database} has a new id")


@click.command()
@click.option("--confirm", is_flag=True, help="Delete everything older than the retention, however much it is.")
@with_service
async def prune(service: OpenService, confirm: bool) -> int:
    """Delete events and decisions that are older than the retention.

    A worker prunes every night. A run deletes the rows from before a cutoff. Each run moves the cutoff by at most three
    days, so that a wrong clock cannot delete more. If the first run on a database would delete more than three days,
    nothing is deleted without --confirm, and the exit code is 1.
    """
    import asyncio

    from app.operations.audit import audited

    action = "prune everything too old" if confirm else "prune"
    async with audited(service.audit_trail, service.clock.now_ms(), ACTOR, action, "") as act:
        await service.retention.move_cutoffs(confirmed=confirm)
        gone = await service.retention.prune(asyncio.sleep)
        lines = [f"{count:,} {what}" for what, count in gone.items()]
        act.outcome = ", ".join(lines) or "nothing"
    for line in lines:
        click.echo(f"{line} deleted")
    if waiting := [what for what in ("events", "decisions") if what not in gone]:
        click.echo(f"{' and '.join(waiting)} not deleted: more than three days; check the clock, then use --confirm")
    return 1 if waiting else 0


@click.group()
def keys() -> None:
    """Create API keys. The service stores only their hashes."""


@keys.command("new")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=("read",), help="May be repeated.")
@json_option
def new(name: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Create a key for NAME and print it with its entry for PROFILES_API_KEYS."""
    if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", name):
        raise click.BadParameter("must be 1 to 64 of A-Z a-z 0-9 _ . -", param_hint="NAME")
    key = "pk_" + secrets.token_urlsafe(32)
    entry = f"{name}:{'+'.join(dict.fromkeys(scopes))}:{hash_key(key).hex()}"
    show(
        {"name": name, "key": key, "entry": entry},
        as_json,
        f"key (not shown again):  {key}",
        f"PROFILES_API_KEYS:      {entry}",
        "Join several entries with commas. Callers send the key in the header X-API-Key.",
    )


@click.command()
@click.option("--full", is_flag=True, help="Also check the integrity of the whole database: about a minute per GB.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too.")
@json_option
@as_command
async def doctor(full: bool, strict: bool, as_json: bool) -> int:
    """Check a deployment and print a remedy for each problem.

    It checks the database, cache, queue, keys, registry and machine, and changes nothing. Run it with the settings of
    the service, which may be running. Exit code 1 if a check is bad.
    """
    from app.bootstrap.engines import load_contract
    from app.operations.doctor import Line, diagnose_keys, diagnose_open_files, diagnose_registry
    from app.stores.valkey.diagnostics import diagnose_servers

    settings = settings_of_command()
    days = {"events": settings.retention_days, "decisions": settings.decision_retention_days}
    disk: list[Line] = []
    if isinstance(settings.database, Path):
        from app.stores.sqlite.diagnostics import diagnose_database, diagnose_machine

        lines, running = diagnose_database(settings.database, SystemClock().now_ms(), days, whole=full)
        disk = diagnose_machine(settings.database)
    else:
        from app.stores.postgres import diagnostics

        lines, running = diagnostics.diagnose_database(settings, settings.database, days, whole=full)
    try:
        registry = diagnose_registry(load_contract(settings).registry.fingerprint, running)
    except (RegistryError, SettingsError) as error:
        text, remedy = f"it cannot be loaded: {error}", "Correct the setting or entry that it names."
        registry = Line("registry", "bad", text, remedy)
    lines += [registry, *disk, diagnose_open_files(), *await diagnose_servers(settings), *diagnose_keys(settings)]
    if as_json:
        show([line._asdict() for line in lines], as_json)
    else:
        for line in lines:
            state = f"[{COLOURS[line.state]}]{line.state:<5}[/]"
            out().print(f"{state}{line.check:<18}{plain(line.text)}", soft_wrap=True)
            if line.remedy:
                out().print(f"{'':<23}{plain(line.remedy)}", soft_wrap=True)
        counts = Counter(line.state for line in lines)
        out().print(f"{counts['bad']} bad, {counts['warn']} warnings, {counts['ok']} ok")
    failing = {"bad", "warn"} if strict else {"bad"}
    return 1 if any(line.state in failing for line in lines) else 0
