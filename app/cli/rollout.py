"""`profiles rollout …`: how the challenger does, and moving it from stage to stage, as on the page /admin/rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from app.cli.output import ACTOR, out, plain, print_json, run, settings_of_command

if TYPE_CHECKING:
    from app.bandit.rollout.stages import Move
    from app.bandit.rollout.status import IntervalView, RolloutStatus

_reason = click.option("--reason", default="", help="Why, for the audit trail; no user's id.")
_json = click.option("--json", "as_json", is_flag=True, help="For a program.")


@click.group()
def rollout() -> None:
    """How the challenger does, and who is served by it.

    Limits, and whether there is a challenger, are taken from this command's settings: give it those of the service.
    """


@rollout.command()
@_json
def status(as_json: bool) -> None:
    """Show stage, verdict and figures of the newest look."""
    _show(run(_work(None, "")), as_json)


def _add_command(move: Move, text: str) -> None:
    @rollout.command(move, help=text)
    @_reason
    @_json
    def command(reason: str, as_json: bool) -> None:
        _show(run(_work(move, reason)), as_json)


_add_command("ramp", "One step more: 5 %, 25 %, 100 % of the users; once rolled back, the shadow anew.")
_add_command("promote", "Let the challenger serve for good, once it serves every user and is shown to be better.")
_add_command("rollback", "Let the champion serve every user again, at any stage.")


async def _work(move: Move | None, reason: str) -> RolloutStatus:
    from app.bootstrap.service import open_service
    from app.errors import InvalidInput, Issue
    from app.operations.audit import reason_problem

    if (wrong := reason_problem(reason)) is not None:
        raise InvalidInput("the reason is not allowed", [Issue("--reason", wrong)])
    async with open_service(settings_of_command(), door="command") as service:
        controller = service.bandit.rollout
        if move is not None:
            await controller.move(move, ACTOR, reason)
        return await controller.status()


def _show(found: RolloutStatus, as_json: bool) -> None:
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found))
        return
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in _rows(found):
        table.add_row(name, plain(text))
    out().print(table)


def _rows(found: RolloutStatus) -> list[tuple[str, str]]:
    return [*_standing(found), *_figures(found), *_guardrails(found), *_moves(found)]


def _standing(found: RolloutStatus) -> list[tuple[str, str]]:
    decisions = found.decisions
    over = found.stage in ("promoted", "rolled back")
    looks = "no more looks" if over or found.challenger is None else f"next look at {decisions.next_look_at:,}"
    verdict = f"{found.verdict.verdict}: {found.verdict.reason}"
    return [
        ("champion", found.champion),
        ("challenger", found.challenger or "none: PROFILES_SHADOW is 0"),
        ("stage", f"{found.stage}, the challenger serves {found.share if found.challenger else 0:.0%} of the users"),
        ("since", f"{found.changed_at or 'the beginning'}, by {found.changed_by}: {found.reason}"),
        ("verdict", "none, the roll-out is over" if over else verdict),
        (
            "decisions",
            f"{decisions.evaluated:,} evaluated, {looks}; {decisions.waiting:,} wait; {decisions.unshadowed:,} without "
            f"a shadow; {decisions.served_by_challenger:,} served by the challenger since the stage began",
        ),
        ("learned about", f"{found.states.users:,} users, {found.states.to_grow:,} yet to grow"),
    ]


def _figures(found: RolloutStatus) -> list[tuple[str, str]]:
    figures = found.figures
    if figures is None:
        return [("look", "none yet")]
    return [
        ("look", f"{figures.look}, {figures.made_at}: {figures.decisions:,} decisions of {figures.users:,} users"),
        ("agreement", f"{figures.agreement:.1%} have the same first candidate under both"),
        ("IPS", f"{_interval(figures.ips)} reward per decision"),
        ("SNIPS", _interval(figures.snips)),
        ("doubly robust", _interval(figures.doubly_robust)),
        ("champion", _interval(figures.champion)),
        ("lift", f"{_interval(figures.lift, '+')}; a loss of {found.margin:g} is accepted"),
        (
            "mean weight",
            f"{figures.mean_weight:.4f} ± {figures.mean_weight_error:.4f}; the champion's "
            f"{figures.champion_mean_weight:.4f} ± {figures.champion_mean_weight_error:.4f}; 1 where all is right",
        ),
        (
            "effective size",
            f"{figures.effective_sample_size:,.0f} decisions; "
            f"the champion's {figures.champion_effective_sample_size:,.0f}; "
            f"{figures.effective_sample_size_needed:,.0f} needed of both",
        ),
    ]


def _guardrails(found: RolloutStatus) -> list[tuple[str, str]]:
    rails, few = found.guardrails, "too few to say"
    shown = rails.dismissals
    dismissed, longest, without = few, few, few
    if shown.more is not None:
        more, low, high = (f"{100 * share:+z.1f}" for share in (shown.more.value, shown.more.low, shown.more.high))
        dismissed = f"challenger {shown.challenger:.1%}, champion {shown.champion:.1%}: {more} points ({low} to {high})"
    if rails.p99_ms.value is not None:
        longest = f"{rails.p99_ms.value:,.0f} ms"
    if rails.no_profile.value is not None:
        without = f"{rails.no_profile.value:.1%}"
    whose = "" if rails.p99_ms.judged else "; they are the champion's, so not judged"
    return [
        ("dismissed", f"{dismissed}; {100 * shown.limit:g} points more are allowed"),
        ("99 in 100", f"answers within: {longest}; {rails.p99_ms.limit:,.0f} ms are allowed{whose}"),
        ("no profile", f"{without}; {rails.no_profile.limit:.1%} are allowed"),
        *(("broken", sentence) for sentence in rails.broken),
    ]


def _moves(found: RolloutStatus) -> list[tuple[str, str]]:
    return [(item.move, "allowed" if item.why_not is None else f"not now: {item.why_not}") for item in found.moves]


def _interval(found: IntervalView, sign: str = "") -> str:
    return f"{found.value:{sign}z.4f} ({found.low:{sign}z.4f} to {found.high:{sign}z.4f})"
