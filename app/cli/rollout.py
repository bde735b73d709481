"""`profiles rollout`: show and change the stage of the challenger, as on the page /admin/rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from app.cli.common import ACTOR, json_option, print_json, print_rows, reason_option, with_service

if TYPE_CHECKING:
    from app.bandit.rollout.stages import Move
    from app.bandit.rollout.status import RolloutStatus
    from app.bootstrap.service import OpenService


@click.group()
def rollout() -> None:
    """Show and change the stage of the challenger.

    Run it with the settings of the service, which contain the guardrails and turn the challenger on or off.
    """


@rollout.command()
@json_option
@with_service
async def status(service: OpenService, as_json: bool) -> None:
    """Show the stage, the verdict and the figures of the newest look (interim analysis)."""
    _show(await service.bandit.rollout.status(), as_json)


def _add_command(move: Move, text: str) -> None:
    @rollout.command(move, help=text)
    @reason_option
    @json_option
    @with_service
    async def command(service: OpenService, reason: str, as_json: bool) -> None:
        await service.bandit.rollout.move(move, ACTOR, reason)
        _show(await service.bandit.rollout.status(), as_json)


_add_command("ramp", "Go one step up: 5 %, 25 %, 100 % of the users. After a rollback: back to the shadow stage.")
_add_command("promote", "Let the challenger serve for good. It must serve all users already and be shown to be better.")
_add_command("rollback", "Let the champion serve all users again. Possible at any stage.")


def _show(found: RolloutStatus, as_json: bool) -> None:
    shown = msgspec.to_builtins(found)
    if as_json:
        print_json(shown)
        return
    del shown["looks"]  # `figures` are those of the newest
    print_rows(shown)
