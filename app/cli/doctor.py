"""`profiles doctor`: looks at a deployment and says what to mend."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING

import click

from app.cli.output import out, plain, print_json, run, settings_of_command
from app.errors import RegistryError, SettingsError
from app.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.operations.doctor import Line
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
    from app.operations.doctor import diagnose_keys
    from app.stores.sqlite.diagnostics import diagnose_database, diagnose_machine
    from app.stores.system_clock import SystemClock
    from app.stores.valkey.diagnostics import diagnose_servers

    days = {"events": settings.retention_days, "decisions": settings.decision_retention_days}
    lines, running = diagnose_database(settings.database, SystemClock().now_ms(), days, whole=full)
    return [
        *lines,
        _registry(settings, running),
        *diagnose_machine(settings.database),
        *await diagnose_servers(settings),
        *diagnose_keys(settings),
    ]


def _registry(settings: Settings, running: Sequence[Sample]) -> Line:
    from app.bootstrap.contract import load_contract
    from app.operations.doctor import Line, diagnose_registry

    try:
        own = load_contract(settings).registry.fingerprint
    except (RegistryError, SettingsError) as error:
        return Line("registry", "bad", f"it cannot be served: {error}", "Correct the setting or entry that it names.")
    return diagnose_registry(own, running)


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
