"""Helpers of the commands: settings, the open service, output to the terminal, errors and exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from app import errors
from app.errors import Issue, ProfilesError
from app.features.ids import visible
from app.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from app.features.contract import Contract

BLOCKED_S = 0.5  # how long after a signal the event loop counts as blocked, and how often this is checked
SHOWN_ISSUES = SHOWN_ROWS = 20
ACTOR = "the command line"  # in the audit trail
# By code: the text of the help, and the errors that lead to it.
EXIT_CODES: dict[int, tuple[str, tuple[type[ProfilesError], ...]]] = {
    2: ("invalid usage, setting or registry", (errors.SettingsError, errors.RegistryError)),
    3: ("the database is not migrated, or is newer than this program", (errors.SchemaMismatch,)),
    4: ("the database, cache or queue does not answer, or a file cannot be written", (errors.Unavailable,)),
    5: ("invalid input", (errors.InvalidInput, errors.Undecodable, errors.Conflict, errors.NotFound)),
}


@cache
def out(*, stderr: bool = False) -> Console:
    """The rich console of standard output or, with `stderr`, of standard error. It is created on first use, because
    `serve` and `worker` do not need rich."""
    from rich.console import Console

    # Output to a file or a program is not wrapped to the width of a screen.
    width = None if stderr or sys.stdout.isatty() else 1_000
    return Console(stderr=stderr, highlight=False, width=width)


err = partial(out, stderr=True)


def exit_code(error: ProfilesError) -> int:
    """The exit code after this error: a key of `EXIT_CODES`, or 1 for an error of another kind."""
    return next((code for code, (_, kinds) in EXIT_CODES.items() if isinstance(error, kinds)), 1)


def say(text: str, *, level: Literal["info", "warning", "error"] = "info", before: str = "") -> None:
    """Write a line to standard error, as JSON if PROFILES_LOG_FORMAT is json. JSON omits the prefix `before`."""
    if os.environ.get("PROFILES_LOG_FORMAT") == "json":
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        click.echo(json.dumps({"event": text, "level": level, "timestamp": now}), err=True)
    else:
        err().print(f"{before}{plain(text)}", soft_wrap=True, style="yellow" if level == "warning" else "")


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


def show(found: Any, as_json: bool, *lines: str) -> None:
    """Print `found`: as JSON, as the `lines` or, if no lines are given, as a table of its names and values."""
    found = msgspec.to_builtins(found)
    if as_json:
        out().print_json(json.dumps(found)) if out().is_terminal else print(json.dumps(found))
    elif lines:
        click.echo("\n".join(lines))
    else:
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


@contextmanager
def progress(
    action: str, unit: str, total: float | None = None, *, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error, if that is a terminal. Yield the function that updates it: it takes
    `advance`, or `completed` and `total`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    disable = not (shown and err().is_terminal)
    with Progress(*columns, TimeRemainingColumn(), console=err(), disable=disable, transient=True) as bar:
        yield partial(bar.update, bar.add_task(action, total=total))


def running_servers(settings: Settings) -> Path:
    """The file in which `profiles up` records its process id and the URLs of its servers."""
    return settings.directory / "run" / "servers.json"


def settings_from_environment(processes: int | None = None) -> Settings:
    """Read the settings. `processes`, if given, replaces PROFILES_PROCESSES. Raises `SettingsError` if a setting is
    invalid, or PROFILES_REWARDS names an unknown outcome."""
    settings = Settings.from_environment()
    if processes is not None:
        settings = replace(settings, processes=processes)
    if settings.rewards:
        from app.bandit.learning.attribution import outcome_rewards

        outcome_rewards(settings.rewards)
    return settings


def settings_of_command() -> Settings:
    """Read the settings of a one-off command, and configure logging to write only warnings and errors. The URLs of the
    cache and the queue default to those of a running `profiles up`."""
    from app.telemetry import configure_logging

    settings = settings_from_environment()
    configure_logging(settings.log_format, "warning")
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
        known = json.loads(running_servers(settings).read_text())
        os.kill(known["pid"], 0)
        cache_url, queue_url = str(known["cache_url"]), str(known["queue_url"])
        return replace(settings, cache_url=settings.cache_url or cache_url, queue_url=settings.queue_url or queue_url)
    return settings


def contract_of_command(registry: str | None = None, *, own_mirror: bool = True) -> tuple[Settings, Contract]:
    """The settings and the features of a one-off command. If `registry`, the value of `registry_option`, is None, the
    settings name the registry of the features. For `own_mirror`, see `load_contract`."""
    from app.bootstrap.engines import load_contract

    settings = settings_of_command()
    return settings, load_contract(settings, registry, own_mirror=own_mirror)


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise `SystemExit`, so that partly written files are removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def as_command(work: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """Wrap a coroutine function that returns an exit code, for `click.command`. SIGINT, SIGTERM and SIGHUP cancel it,
    so that partly written files are removed; another signal cancels the cleanup."""

    @wraps(work)
    def command(*arguments: Any, **options: Any) -> None:
        import asyncio

        received: list[BaseException] = []

        async def cancellable() -> int | None:
            with _cancelled_by_signals(received):
                return await work(*arguments, **options)

        try:
            sys.exit(asyncio.run(cancellable()))
        except asyncio.CancelledError as error:
            raise [*received, error][0] from None

    return command


@contextmanager
def _cancelled_by_signals(received: list[BaseException]) -> Iterator[None]:
    """At a signal, cancel the current task, and store in `received` the exception that is to end the process."""
    from asyncio import current_task, get_running_loop

    from app.concurrency.tasks import stop_signals

    loop = get_running_loop()
    task: Any = current_task()
    blocked_at = float("inf")  # when the event loop counts as blocked, because it has not run `cancel`

    def cancel() -> None:
        nonlocal blocked_at
        blocked_at = float("inf")
        if received:
            task.cancel()

    def on_signal(number: int, _frame: object) -> None:
        nonlocal blocked_at
        if task.done():
            sys.exit(128 + number)
        received[:] = [KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)]
        blocked_at = loop.time() + BLOCKED_S
        loop.call_soon_threadsafe(cancel)

    def on_alarm(*_: object) -> None:
        # The event loop is blocked, for example by reading a pipe. Raise in the task that blocks it: an exception
        # between the steps of two tasks could drop the next step of one, which the loop would then await for ever.
        if received and loop.time() >= blocked_at and current_task(loop) is not None:
            ended = received.pop()
            # A destructor drops the exception; then `cancel` or the next alarm must find it again.
            sys.unraisablehook = lambda dropped: received.append(ended) if dropped.exc_value is ended else None
            raise ended

    for number in {item for item in stop_signals() if signal.getsignal(item) is not signal.SIG_IGN}:
        signal.signal(number, on_signal)
    # Regularly, because a read that begins between the arrival of a signal and its handler would not be interrupted.
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, BLOCKED_S, BLOCKED_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def with_service(work: Callable[..., Coroutine[Any, Any, int | None]]) -> Callable[..., None]:
    """Wrap a coroutine function as `as_command` does, and pass an open service as its first argument. The service has
    the registry of `registry_option`, if the command has that option."""

    @wraps(work)
    async def with_opened(*arguments: Any, **options: Any) -> int | None:
        from app.bootstrap.service import open_service

        settings, contract = contract_of_command(options.pop("registry", None))
        async with open_service(settings, door="command", contract=contract) as service:
            return await work(service, *arguments, **options)

    return as_command(with_opened)
