"""Helpers of the commands: options and arguments, settings, output to the terminal, errors and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from app import errors
from app.errors import InvalidInput, Issue, ProfilesError
from app.features.clock import to_ms
from app.features.ids import id_problem, visible
from app.settings import Settings, parsers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from app.bootstrap.service import OpenService

T = TypeVar("T")
SHOWN_ISSUES = SHOWN_ROWS = 20
WIDE = 1_000
ACTOR = "the command line"  # in the audit trail
# By code: the text of the help, and the errors that lead to it.
EXIT_CODES: dict[int, tuple[str, tuple[type[ProfilesError], ...]]] = {
    2: ("invalid usage, setting or registry", (errors.SettingsError, errors.RegistryError)),
    3: ("the database is not migrated, or is newer than this program", (errors.SchemaMismatch,)),
    4: ("the database, cache or queue does not answer, or a file cannot be written", (errors.Unavailable,)),
    5: ("invalid input", (errors.InvalidInput, errors.Undecodable, errors.Conflict, errors.NotFound)),
}


@cache
def out() -> Console:
    """The rich console of standard output, created on first use, because `serve` and `worker` do not need rich."""
    from rich.console import Console

    # Output to a file or a program is not wrapped to the width of a screen.
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


@cache
def err() -> Console:
    """The rich console of standard error, created on first use."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _registry_source(_: click.Context, __: click.Parameter, source: str | None) -> str | None:
    try:
        return None if source is None else parsers.registry_source(source)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _reason(_: click.Context, __: click.Parameter, reason: str) -> str:
    from app.operations.audit import reason_problem

    if (problem := reason_problem(reason)) is not None:
        raise InvalidInput("the reason is invalid", [Issue("--reason", problem)])
    return reason


def _users(_: click.Context, __: click.Parameter, users: tuple[str, ...]) -> list[str]:
    for user in users:
        check_user(user)
    return list(dict.fromkeys(users))


users_argument = click.argument("users", nargs=-1, callback=_users)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
reason_option = click.option(
    "--reason", default="", callback=_reason, help="The reason for the audit trail; it must not contain a user id."
)
registry_option = click.option(
    "--registry",
    metavar="SOURCE",
    callback=_registry_source,
    help="Use this registry instead of PROFILES_FEATURES: package.module:NAME or /path/features.py:NAME.",
)


def exit_code(error: ProfilesError) -> int:
    """The exit code after this error: a key of `EXIT_CODES`, or 1 for an error of another kind."""
    return next((code for code, (_, kinds) in EXIT_CODES.items() if isinstance(error, kinds)), 1)


def say(text: str, *, level: Literal["info", "warning", "error"] = "info", before: str = "") -> None:
    """Write a line to standard error, as JSON if PROFILES_LOG_FORMAT is json. JSON omits the prefix `before`."""
    if as_json_lines():
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        click.echo(json.dumps({"event": text, "level": level, "timestamp": now}), err=True)
    else:
        style = {"info": "", "warning": "yellow", "error": ""}[level]
        err().print(f"{before}{plain(text)}", soft_wrap=True, style=style)


def as_json_lines() -> bool:
    return os.environ.get("PROFILES_LOG_FORMAT") == "json"


def fail(error: ProfilesError) -> None:
    """Write an error and its first `SHOWN_ISSUES` issues to standard error."""
    say(str(error), level="error", before="[bold red]error:[/] ")
    for issue in error.issues[:SHOWN_ISSUES]:
        complain(issue)
    if len(error.issues) > SHOWN_ISSUES:
        say(f"and {len(error.issues) - SHOWN_ISSUES} more", level="error", before="  … ")


def complain(issue: Issue) -> None:
    say(f"{issue.path}: {issue.detail}", level="error", before="  ")


def plain(text: str) -> str:
    """Untrusted text made safe for the terminal, with rich's markup escaped and invisible characters shown as codes."""
    return visible(text).replace("[", r"\[")


def print_json(value: object) -> None:
    out().print_json(json.dumps(value)) if out().is_terminal else print(json.dumps(value))


def print_rows(found: Mapping[str, Any]) -> None:
    """Print nested data as a table of names and values."""
    from rich.table import Column, Table

    table = Table(Column(no_wrap=True), Column(overflow="fold"), show_header=False)
    for name, text in _rows(found):
        table.add_row(name, text)
    out().print(table)


def _rows(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict) and "low" not in value:
            yield from _rows(value, f"{name}: ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ((name, _text(item)) for item in value[:SHOWN_ROWS])
            if len(value) > SHOWN_ROWS:
                yield name, f"and {len(value) - SHOWN_ROWS} more; --json lists all"
        else:
            yield name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, dict):  # an interval, or an item of a list
        return ", ".join(f"{key.replace('_', ' ')} {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"  # never as 1.2e+04
    return plain(str(value))


def progress(unit: str, *, shown: bool = True) -> Progress:
    """A progress bar on standard error, hidden if `shown` is false or standard error is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(
        *columns, TimeRemainingColumn(), console=err(), disable=not (shown and err().is_terminal), transient=True
    )


def running_servers(settings: Settings) -> Path:
    """The file in which `profiles up` records its process id and the URLs of its servers."""
    return settings.directory / "run" / "servers.json"


def settings_from_environment() -> Settings:
    """Read the settings. Raises `SettingsError` if one is invalid, or PROFILES_REWARDS names an unknown outcome."""
    settings = Settings.from_environment()
    if settings.rewards:
        from app.bandit.learning.attribution import outcome_rewards

        outcome_rewards(settings.rewards)
    return settings


def settings_of_command() -> Settings:
    """Read the settings of a one-off command, and configure logging to write only warnings and errors.

    If the URL of the cache or of the queue is not set, the URL of a running `profiles up` is used, if one runs.
    """
    from app.telemetry import configure_logging

    settings = settings_from_environment()
    configure_logging(settings.log_format, "warning")
    if settings.cache_url is None or settings.queue_url is None:
        settings = with_running_servers(settings)
    return settings


def with_running_servers(settings: Settings) -> Settings:
    """The settings, in which each server URL that is not set is replaced by that of a running `profiles up`, if any."""
    try:
        known = json.loads(running_servers(settings).read_text())
        os.kill(known["pid"], 0)
        return replace(
            settings,
            cache_url=settings.cache_url or str(known["cache_url"]),
            queue_url=settings.queue_url or str(known["queue_url"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return settings


def stop_on_sigterm() -> None:
    """Make SIGTERM raise `SystemExit`, so that partly written files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # asyncio would replace the default handler by one that waits until a blocking read, of a pipe, returns.
        signal.signal(signal.SIGINT, lambda *_: signal.default_int_handler(signal.SIGINT, None))
    return asyncio.run(work)


def with_service(command: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """Make a command of a coroutine function whose first argument is an open service. Its result is the exit code. The
    service has the registry of `registry_option`, if the command has that option."""

    @wraps(command)
    def run_command(*arguments: Any, **options: Any) -> None:
        from app.bootstrap.contract import load_contract
        from app.bootstrap.service import open_service

        async def work() -> int | None:
            settings = settings_of_command()
            contract = load_contract(settings, options.pop("registry", None))
            async with open_service(settings, door="command", contract=contract) as service:
                return await command(service, *arguments, **options)

        sys.exit(run(work()))

    return run_command


def check_user(user: str, place: str = "user_id") -> None:
    """Raise `InvalidInput` if the user id is invalid; the error names `place`, the option or field with the id."""
    if (problem := id_problem(user)) is not None:
        raise InvalidInput("the user id is invalid", [Issue(place, problem)])


def moment_ms(text: str, place: str) -> int:
    """Convert an ISO 8601 time with a UTC offset to epoch milliseconds. Raises `InvalidInput` if the text is invalid;
    the error names `place`, the option or field that contains it."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        reason = "lacks a UTC offset" if moment is not None else "is not a time"
        example = "write it as 2026-04-25T08:30:00+02:00"
        raise InvalidInput("a time is invalid", [Issue(place, f"{text!r} {reason}; {example}")])
    return to_ms(moment)


async def user_pages(
    service: OpenService, users: list[str], since_ms: int, size: int, action: str
) -> AsyncIterator[list[str]]:
    """Yield `users` in pages of `size`; if `users` is empty, every user with an event after `since_ms`.

    Show a progress bar, which is labelled `action`.
    """
    total = len(users) or await service.users.count_eligible(since_ms)
    after, done = "", 0
    with progress("users") as bar:
        task = bar.add_task(action, total=total)
        while page := users[done : done + size] if users else await service.users.eligible(after, since_ms, size):
            yield page
            after, done = page[-1], done + len(page)
            bar.update(task, completed=done, total=max(total, done))
