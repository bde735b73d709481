"""What commands share: the terminal, errors as one line, exit codes, and which servers to talk to."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

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
from app.settings import Settings, parsers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
SHOWN_ISSUES = 20
WIDE = 1_000
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

    # What goes to a file or a program is not made to fit a screen.
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


@cache
def err() -> Console:
    """Standard error, likewise."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _registry_source(_: click.Context, __: click.Parameter, source: str | None) -> str | None:
    try:
        return None if source is None else parsers.registry_source(source)
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


def say(text: str, *, level: Literal["info", "warning", "error"] = "info", before: str = "") -> None:
    """A line on standard error; one of the log where that is JSON. `before` is for people alone."""
    if as_json_lines():
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        click.echo(json.dumps({"event": text, "level": level, "timestamp": now}), err=True)
    else:
        style = {"info": "", "warning": "yellow", "error": ""}[level]
        err().print(f"{before}{plain(text)}", soft_wrap=True, style=style)


def as_json_lines() -> bool:
    """Whether standard error is for a program that collects logs."""
    return os.environ.get("PROFILES_LOG_FORMAT") == "json"


def fail(error: ProfilesError) -> None:
    """Say what is wrong, on standard error."""
    say(str(error), level="error", before="[bold red]error:[/] ")
    issues = getattr(error, "issues", ())
    for issue in issues[:SHOWN_ISSUES]:
        complain(issue)
    if len(issues) > SHOWN_ISSUES:
        say(f"and {len(issues) - SHOWN_ISSUES} more", level="error", before="  … ")


def complain(issue: Issue) -> None:
    """Say what is wrong with one thing among many, on standard error."""
    say(f"{issue.path}: {issue.detail}", level="error", before="  ")


def plain(text: str) -> str:
    """Text from outside: no markup, nothing that cannot be seen."""
    from app.features.ids import visible

    return visible(text).replace("[", r"\[")


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
    from app.bandit.learning.rewards import outcome_rewards

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
