"""`profiles rollout`: show and change the stage of the challenger, as on the page /admin/rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from app.cli.common import ACTOR, json_option, out, plain, print_json, reason_option, with_service

if TYPE_CHECKING:
    from app.bandit.rollout.bootstrap_intervals import IntervalView
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
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    from rich.table import Column, Table

    table = Table(Column(no_wrap=True), Column(), show_header=False)
    moves = [(item.move, "allowed" if item.why_not is None else f"not allowed: {item.why_not}") for item in found.moves]
    for name, text in [*_standing(found), *_figures(found), *_guardrails(found), *_experiment(found), *moves]:
        table.add_row(name, plain(text))
    out().print(table)


def _standing(found: RolloutStatus) -> list[tuple[str, str]]:
    decisions = found.decisions
    over = found.stage in ("promoted", "rolled back")
    looks = "no further look" if over or found.challenger is None else f"next look at {decisions.next_look_at:,}"
    verdict = f"{found.verdict.verdict}: {found.verdict.reason}"
    return [
        ("champion", found.champion),
        ("challenger", found.challenger or "none: PROFILES_SHADOW is 0"),
        ("stage", f"{found.stage}, the challenger serves {found.share if found.challenger else 0:.0%} of the users"),
        ("since", f"{found.changed_at or 'the beginning'}, by {found.changed_by}: {found.reason}"),
        ("verdict", "none: the roll-out is over" if over else verdict),
        (
            "decisions",
            f"{decisions.evaluated:,} evaluated, {looks}; {decisions.waiting:,} waiting; "
            f"{decisions.unshadowed:,} without a shadow; {decisions.without_prior:,} made before the first prior; "
            f"{decisions.served_by_challenger:,} served by the challenger since the stage began",
        ),
        ("learned", f"{found.states.users:,} users, {found.states.to_grow:,} with an older spec"),
    ]


def _figures(found: RolloutStatus) -> list[tuple[str, str]]:
    figures = found.figures
    if figures is None:
        return [("look", "none yet")]
    return [
        ("look", f"{figures.look}, {figures.made_at}: {figures.decisions:,} decisions of {figures.users:,} users"),
        ("agreement", f"{figures.agreement:.1%} of the decisions rank the same candidate first"),
        ("IPS", f"{_interval(figures.ips)} reward per decision"),
        ("SNIPS", _interval(figures.snips)),
        ("doubly robust", _interval(figures.doubly_robust)),
        ("champion", _interval(figures.champion)),
        ("lift", f"{_interval(figures.lift, '+')}; a loss of {found.margin:g} is allowed"),
        ("of that, pool", _interval(figures.lift_pool, "+")),
        ("of that, profile", _interval(figures.lift_profile, "+")),
        (
            "mean weight",
            f"{figures.mean_weight:.4f} ± {figures.mean_weight_error:.4f}; the champion's "
            f"{figures.champion_mean_weight:.4f} ± {figures.champion_mean_weight_error:.4f}; expected 1",
        ),
        (
            "effective size",
            f"{figures.effective_sample_size:,.0f} decisions; "
            f"the champion's {figures.champion_effective_sample_size:,.0f}; "
            f"{figures.effective_sample_size_needed:,.0f} needed for each",
        ),
    ]


def _guardrails(found: RolloutStatus) -> list[tuple[str, str]]:
    rails, few = found.guardrails, "too few decisions"
    shown = rails.dismissals
    dismissed, longest, without = few, few, few
    if shown.more is not None:
        more, low, high = (f"{100 * share:+z.1f}" for share in (shown.more.value, shown.more.low, shown.more.high))
        dismissed = f"challenger {shown.challenger:.1%}, champion {shown.champion:.1%}: {more} points ({low} to {high})"
    if rails.p99_ms.value is not None:
        longest = f"{rails.p99_ms.value:,.0f} ms"
    if rails.no_profile.value is not None:
        without = f"{rails.no_profile.value:.1%}"
    whose = "" if rails.p99_ms.judged else "; these are the champion's and do not count"
    return [
        ("dismissed", f"{dismissed}; {100 * shown.limit:g} more points are allowed"),
        ("p99 latency", f"{longest}; {rails.p99_ms.limit:,.0f} ms are allowed{whose}"),
        ("no profile", f"{without}; {rails.no_profile.limit:.1%} are allowed"),
        *(("broken", sentence) for sentence in rails.broken),
    ]


def _experiment(found: RolloutStatus) -> list[tuple[str, str]]:
    if (test := found.experiment) is None:
        return []
    return [
        (name, f"{arm.users:,} users, {arm.decisions:,} recent decisions, reward {_interval(arm.reward)}")
        for name, arm in (("of champion", test.champion), ("of challenger", test.challenger))
    ] + [("difference", f"{_interval(test.lift, '+')}; such numbers of users have the probability {test.p:.2g}")]


def _interval(found: IntervalView | None, sign: str = "") -> str:
    if found is None:
        return "too few to say"
    return f"{found.value:{sign}z.4f} ({found.low:{sign}z.4f} to {found.high:{sign}z.4f})"
