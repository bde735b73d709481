"""The command line `profiles`, on click. Commands import their dependencies when they run, so `--help` is fast."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

import click

import app
from app.cli.audit import audit
from app.cli.backup import adopt, backup, restore
from app.cli.change import demo, events, prune, rebuild
from app.cli.common import EXIT_CODES, exit_code, fail
from app.cli.doctor import doctor
from app.cli.features import features
from app.cli.history import history
from app.cli.keys import keys
from app.cli.profile import profile
from app.cli.rollout import rollout
from app.cli.run import migrate, serve, up, worker
from app.errors import ProfilesError

_EPILOG = "Exit codes: 0 success; 1 partial failure; " + "; ".join(
    f"{code} {text}" for code, text in EXIT_CODES.items()
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG + ".")
@click.version_option(app.__version__, prog_name="profiles")
def cli() -> None:
    """User-profile features, served fresh.

    Start with `profiles up`: it runs everything on this machine, with a demonstration set. Settings are environment
    variables PROFILES_…; docker/README.md lists them.
    """


COMMANDS = (
    *(up, serve, worker, migrate),
    *(features, profile, history, rebuild, events, demo),
    *(rollout, doctor, audit, prune, backup, restore, adopt, keys),
)
for command in COMMANDS:
    cli.add_command(command)


def _as_utf8(argument: str) -> str:
    """The argument decoded as UTF-8, even if Python decoded it with an ASCII locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def main() -> None:
    """Run the command; a `ProfilesError` becomes a message and an exit code instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):  # the encoding of a terminal may lack characters
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli(prog_name="profiles", args=[_as_utf8(argument) for argument in sys.argv[1:]])
    except ProfilesError as error:
        fail(error)
        sys.exit(exit_code(error))
