"""What commands share: the terminal, errors as one line, exit codes, and which servers to talk to."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from app import setting_values
from app.errors import (
    Conflict,
    InvalidInput,
    Issue,
    NotFound,
    ProfilesError,
    RegistryError,
    SchemaMismatch,
    SettingsError,
    Unavailable,
    Undecodable,
)
from app.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
SHOWN_ISSUES = 20
ACTOR = "the command line"  # in the audit trail
EXIT_CODES = {
    2: "wrong usage, setting or registry",
    3: "the database is unmigrated or newer",
    4: "database, cache or queue do not answer",
    5: "the input is invalid",
}
_CODE_OF: tuple[tuple[type[ProfilesError], int], ...] = (
    (SettingsError, 2),
    (RegistryError, 2),
    (SchemaMismatch, 3),
    (Unavailable, 4),
    (InvalidInput, 5),
    (Undecodable, 5),
    (Conflict, 5),
    (NotFound, 5),
)


@cache
def out() -> Console:
    """Standard output. Made when it is first written on: `serve` and `worker` need no rich."""
    from rich.console import Console

    return Console(highlight=False)


@cache
def err() -> Console:
    """Standard error, likewise."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _registry_source(_: click.Context, __: click.Parameter, source: str | None) -> str | None:
    try:
        return None if source is None else setting_values.registry_source(source)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


registry_option = click.option(
    "--registry",
    metavar="SOURCE",
    callback=_registry_source,
    help="Another registry than PROFILES_FEATURES names: package.module:NAME or /path/features.py:NAME.",
)


def exit_code(error: ProfilesError) -> int:
    """The code a script can tell the kind of error by."""
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), 1)


def fail(error: ProfilesError) -> None:
    """Say what is wrong, on standard error."""
    err().print(f"[bold red]error:[/] {plain(str(error))}", soft_wrap=True)
    issues = getattr(error, "issues", ())
    for issue in issues[:SHOWN_ISSUES]:
        complain(issue)
    if len(issues) > SHOWN_ISSUES:
        err().print(f"  … and {len(issues) - SHOWN_ISSUES} more")


def complain(issue: Issue) -> None:
    """Say what is wrong with one thing among many, on standard error."""
    err().print(f"  {plain(issue.path)}: {plain(issue.detail)}", soft_wrap=True)


def plain(text: str) -> str:
    """Text from outside: no markup, no control characters."""
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
    return shown.replace("[", r"\[")


def print_json(value: object) -> None:
    """One JSON document on standard output, for programs."""
    out().print_json(json.dumps(value)) if out().is_terminal else print(json.dumps(value))


def progress(unit: str, *, shown: bool = True) -> Progress:
    """A progress bar on standard error; silent where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(
        *columns, TimeRemainingColumn(), console=err(), disable=not (shown and err().is_terminal), transient=True
    )


def running_servers(database: Path) -> Path:
    """The file in which `profiles up` says where its servers are."""
    return database.parent / "run" / "servers.json"


def settings_from_environment() -> Settings:
    """The settings of this process.

    Raises:
        SettingsError: a setting is invalid, or names an outcome of decisions that does not exist.
    """
    from app.bandit.rewards import outcome_rewards

    settings = Settings.from_environment()
    outcome_rewards(settings.rewards)
    return settings


def settings_of_command() -> Settings:
    """Settings for a command that works beside the service: it finds the servers of a running `profiles up`."""
    from app.telemetry import configure_logging

    settings = settings_from_environment()
    configure_logging(settings.log_format, "warning")
    if settings.cache_url is None or settings.queue_url is None:
        settings = with_running_servers(settings)
    return settings


def with_running_servers(settings: Settings) -> Settings:
    """The settings, with the servers of a running `profiles up` where none are named."""
    try:
        known = json.loads(running_servers(settings.database).read_text())
        os.kill(known["pid"], 0)
        return replace(
            settings,
            cache_url=settings.cache_url or str(known["cache_url"]),
            queue_url=settings.queue_url or str(known["queue_url"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return settings


def stop_on_sigterm() -> None:
    """SIGTERM raises, so that a file that is half written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine."""
    import asyncio

    return asyncio.run(work)
