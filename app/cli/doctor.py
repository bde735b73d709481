"""`profiles doctor`: looks at a deployment and says what to mend."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING

import click

from app.cli.output import out, plain, print_json, run, settings_of_command
from app.errors import RegistryError, SchemaMismatch, SettingsError, StoreUnavailable
from app.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.operations.doctor.facts import Line, ServerFacts, Unreached
    from app.operations.samples import Sample

COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@click.command()
@click.option("--full", is_flag=True, help="Read the whole database, too: about a minute for each GB.")
@click.option("--strict", is_flag=True, help="Warnings count for the exit code.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def doctor(full: bool, strict: bool, as_json: bool) -> None:
    """Look at database, cache, queue, keys and machine, and say what to mend.

    Exit code 1 where something is bad, 0 otherwise. It changes nothing, and works beside a running service, whose
    settings it must be given.
    """
    lines = run(_diagnose(settings_of_command(), full))
    if as_json:
        print_json([line._asdict() for line in lines])
    else:
        _show(lines)
    failing = {"bad", "warn"} if strict else {"bad"}
    sys.exit(1 if any(line.state in failing for line in lines) else 0)


async def _diagnose(settings: Settings, full: bool) -> list[Line]:
    from app.operations.doctor.keys import diagnose_keys
    from app.operations.doctor.servers import diagnose_both, diagnose_cache, diagnose_queue

    cache = await _server("PROFILES_CACHE_URL", settings.cache_url, None)
    queue = await _server("PROFILES_QUEUE_URL", settings.queue_url, settings.queue_name)
    return [
        *_database(settings, full),
        *diagnose_cache(cache),
        *diagnose_queue(queue),
        *diagnose_both(cache, queue),
        *diagnose_keys(settings),
    ]


def _database(settings: Settings, full: bool) -> list[Line]:
    from app.events.retention import next_cutoff
    from app.features.clock import DAY_MS
    from app.operations.doctor.database import diagnose_database, diagnose_machine, diagnose_retention
    from app.operations.doctor.facts import Line
    from app.stores.sqlite.diagnostics import database_facts, machine_facts
    from app.stores.system_clock import SystemClock

    machine, now_ms = machine_facts(settings.database), SystemClock().now_ms()
    try:
        found = database_facts(settings.database, now_ms, whole=full)
    except SchemaMismatch as error:
        remedy = "Run `profiles migrate`, with the service stopped; or the release that the database belongs to."
        unusable = Line("database", "bad", str(error), remedy)
    except StoreUnavailable as error:
        remedy = "Run `profiles migrate` for a new database, or `profiles restore` for a backup."
        unusable = Line("database", "bad", str(error), remedy)
    else:
        shown = f"{settings.database} answers and is migrated ({found.bytes / 2**20:,.1f} MiB)"
        days = {"events": settings.retention_days, "decisions": settings.decision_retention_days}
        waiting = [what for what in days if next_cutoff(now_ms - days[what] * DAY_MS, *found.kept[what]) is None]
        looked = [Line("database", "ok", shown), *diagnose_database(found), diagnose_retention(waiting)]
        return [*looked, _registry(settings, found.running), *diagnose_machine(machine, found.bytes)]
    return [unusable, _registry(settings, ()), *diagnose_machine(machine, 0)]


def _registry(settings: Settings, running: Sequence[Sample]) -> Line:
    from app.bootstrap.contract import load_contract
    from app.operations.doctor.facts import Line
    from app.operations.doctor.features import diagnose_registry

    try:
        own = load_contract(settings).registry.fingerprint
    except (RegistryError, SettingsError) as error:
        return Line("registry", "bad", f"it cannot be served: {error}", "Correct the setting or entry that it names.")
    return diagnose_registry(own, running)


async def _server(setting: str, url: str | None, queue: str | None) -> ServerFacts | Unreached:
    from app.operations.doctor.facts import Unreached
    from app.stores.valkey.diagnostics import server_facts

    if url is None:
        return Unreached(f"{setting} is not set, and no `profiles up` runs here")
    try:
        return await server_facts(url, queue)
    except ValueError as error:
        return Unreached(f"{setting}: {error}")


def _show(lines: list[Line]) -> None:
    for line in lines:
        out().print(
            f"[{COLOURS[line.state]}]{line.state:<5}[/]{line.check:<18}{plain(line.text)}",
            soft_wrap=True,
        )
        if line.remedy:
            out().print(f"{'':<23}{plain(line.remedy)}", soft_wrap=True)
    counts = Counter(line.state for line in lines)
    out().print(f"{counts['bad']} bad, {counts['warn']} to look at, {counts['ok']} ok")
