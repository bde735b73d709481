"""The command line `profiles`, built with click. A command imports what it needs only when it runs."""

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

import click

import app
from app.cli.common import EXIT_CODES, exit_code, fail
from app.errors import ProfilesError, StoreUnavailable

# The module in `app.cli` of each command.
COMMANDS = {
    **dict.fromkeys(("up", "serve", "worker"), "run"),
    **dict.fromkeys(("adopt", "backup", "doctor", "keys", "migrate", "prune", "restore"), "operate"),
    **dict.fromkeys(("features", "openapi"), "features"),
    **dict.fromkeys(("audit", "profile", "rebuild"), "profiles"),
    **dict.fromkeys(("demo", "events"), "events"),
    **dict.fromkeys(("decisions", "evaluate", "rollout"), "bandit"),
    "history": "history",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"app.cli.{COMMANDS[cmd_name]}"), cmd_name)
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success; 1 partial failure, or a check found a fault; "
    + "; ".join(f"{code} {text}" for code, (text, _) in EXIT_CODES.items())
    + ".",
)
@click.version_option(app.__version__, prog_name="profiles")
def cli() -> None:
    """User-profile features, served fresh.

    Start with `profiles up`: it runs everything on this machine, with a demonstration set. Settings are environment
    variables PROFILES_…; docker/README.md lists them.
    """


def _as_utf8(argument: str) -> str:
    """The argument decoded as UTF-8, even if Python decoded it with an ASCII locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def main() -> None:
    """Run the command. A `ProfilesError`, or an error of the operating system such as a full disk, becomes a message
    and an exit code instead of a traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # open until the process ends
    for stream in (sys.stdout, sys.stderr):  # the encoding of a terminal may lack characters
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            cli(prog_name="profiles", args=[_as_utf8(argument) for argument in sys.argv[1:]])
        finally:
            sys.stdout.flush()
    except ProfilesError as error:
        fail(error)
        sys.exit(exit_code(error))
    except OSError as error:
        # What is left in the buffer cannot be written either, and Python would try when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has closed the pipe
            sys.exit(1)
        place = error.filename or "the output of the command"
        fail(failed := StoreUnavailable(f"cannot read or write {place}: {error.strerror or error}"))
        sys.exit(exit_code(failed))
