"""`profiles doctor`: check a deployment."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli.common import json_option, out, plain, print_json, run, settings_of_command
from app.errors import RegistryError, SettingsError
from app.features.clock import SystemClock
from app.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.operations.doctor import Line
    from app.operations.samples import Sample

COLOURS = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@click.command()
@click.option("--full", is_flag=True, help="Also check the integrity of the whole database: about a minute per GB.")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too.")
@json_option
def doctor(full: bool, strict: bool, as_json: bool) -> None:
    """Check a deployment and print a remedy for each problem.

    It checks the database, cache, queue, keys, registry and machine, and changes nothing. Run it with the settings of
    the service, which may be running. Exit code 1 if a check is bad.
    """
    lines = run(_diagnose(settings_of_command(), full))
    if as_json:
        print_json([line._asdict() for line in lines])
    else:
        _show(lines)
    failing = {"bad", "warn"} if strict else {"bad"}
    sys.exit(1 if any(line.state in failing for line in lines) else 0)


async def _diagnose(settings: Settings, full: bool) -> list[Line]:
    from app.operations.doctor import diagnose_keys, diagnose_open_files
    from app.stores.valkey.diagnostics import diagnose_servers

    lines, running, disk = _database(settings, full)
    return [
        *lines,
        _registry(settings, running),
        *disk,
        diagnose_open_files(),
        *await diagnose_servers(settings),
        *diagnose_keys(settings),
    ]


def _database(settings: Settings, full: bool) -> tuple[list[Line], list[Sample], list[Line]]:
    """Check the database. Return the results, the newest sample of each process's metrics, and the results for the disk
    of this machine. With `full`, the whole database is checked for integrity."""
    days = {"events": settings.retention_days, "decisions": settings.decision_retention_days}
    if isinstance(settings.database, Path):
        from app.stores.sqlite.diagnostics import diagnose_database, diagnose_machine

        file = settings.database
        return (*diagnose_database(file, SystemClock().now_ms(), days, whole=full), diagnose_machine(file))
    from app.stores.postgres import diagnostics

    return (*diagnostics.diagnose_database(settings, settings.database, days, whole=full), [])


def _registry(settings: Settings, running: Sequence[Sample]) -> Line:
    from app.bootstrap.contract import load_contract
    from app.operations.doctor import Line, diagnose_registry

    try:
        own = load_contract(settings).registry.fingerprint
    except (RegistryError, SettingsError) as error:
        return Line("registry", "bad", f"it cannot be loaded: {error}", "Correct the setting or entry that it names.")
    return diagnose_registry(own, running)


def _show(lines: list[Line]) -> None:
    for line in lines:
        state = f"[{COLOURS[line.state]}]{line.state:<5}[/]"
        out().print(f"{state}{line.check:<18}{plain(line.text)}", soft_wrap=True)
        if line.remedy:
            out().print(f"{'':<23}{plain(line.remedy)}", soft_wrap=True)
    counts = Counter(line.state for line in lines)
    out().print(f"{counts['bad']} bad, {counts['warn']} warnings, {counts['ok']} ok")
