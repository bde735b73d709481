"""Options and arguments that several commands have, and checks of user ids and times."""

from datetime import datetime
from functools import partial

import click

from app.errors import InvalidInput, Issue
from app.features.clock import to_ms
from app.features.ids import id_problem
from app.settings import parsers


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


def _moment(_: click.Context, option: click.Parameter, text: str | None) -> int | None:
    return None if text is None else moment_ms(text, option.opts[0])


# The options of times, as milliseconds since 1970.
time_option = partial(click.option, metavar="TIME", callback=_moment)
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
