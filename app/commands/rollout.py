"""`profiles rollout …`: how the challenger does, and moving it from stage to stage, as on the page /admin/rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from app.commands.output import out, plain, print_json, run, settings_of_command

if TYPE_CHECKING:
    from app.api.admin.rollout_schemas import IntervalView, RolloutView
    from app.bandit.stages import Move

ACTOR = "the command line"
_reason = click.option("--reason", default="", help="Why, for the audit trail; no user's id.")
_json = click.option("--json", "as_json", is_flag=True, help="For a program.")


@click.group()
def rollout() -> None:
    """How the challenger does, and who is served by it."""


@rollout.command()
@_json
def status(as_json: bool) -> None:
    """Show stage, verdict and figures of the newest look."""
    _show(run(_work(None, "")), as_json)


@rollout.command()
@_reason
@_json
def ramp(reason: str, as_json: bool) -> None:
    """One step more: 5 %, 25 %, 100 % of the users; once rolled back, the shadow anew."""
    _show(run(_work("ramp", reason)), as_json)


@rollout.command()
@_reason
@_json
def promote(reason: str, as_json: bool) -> None:
    """Let the challenger serve for good, once it serves everybody and is shown to be better."""
    _show(run(_work("promote", reason)), as_json)


@rollout.command()
@_reason
@_json
def rollback(reason: str, as_json: bool) -> None:
    """Let the champion serve everybody again, at any stage."""
    _show(run(_work("rollback", reason)), as_json)


async def _work(move: Move | None, reason: str) -> RolloutView:
    from app.api.admin.letters import reason_problem
    from app.api.admin.rollout_views import view
    from app.assembly import open_service
    from app.errors import InvalidInput, Issue

    if (wrong := reason_problem(reason)) is not None:
        raise InvalidInput("the reason is not allowed", [Issue("--reason", wrong)])
    async with open_service(settings_of_command(), door="command") as service:
        bandit = service.bandit
        if move is not None:
            await bandit.rollout.move(move, ACTOR, reason)
        return view(await bandit.rollout.status(), bandit.lineup)


def _show(found: RolloutView, as_json: bool) -> None:
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


def _rows(found: RolloutView) -> list[tuple[str, str]]:
    decisions, figures, rails = found.decisions, found.figures, found.guardrails
    rows = [
        ("stage", f"{found.stage}, {found.share:.0%} of the users"),
        ("since", f"{found.changed_at or 'the beginning'}, by {found.changed_by}: {found.reason}"),
        ("verdict", f"{found.verdict.verdict}: {found.verdict.reason}"),
        (
            "decisions",
            f"{decisions.evaluated:,} evaluated, next look at {decisions.next_look_at:,}; {decisions.waiting:,} wait; "
            f"{decisions.unshadowed:,} without a shadow; {decisions.served_by_challenger:,} served by the challenger",
        ),
        ("states", f"{found.states.users:,} learned, {found.states.to_grow:,} yet to grow"),
    ]
    if figures is not None:
        rows += [
            ("look", f"{figures.look}, {figures.made_at}: {figures.decisions:,} decisions of {figures.users:,} users"),
            ("agreement", f"{figures.agreement:.1%}"),
            ("IPS", _interval(figures.ips)),
            ("SNIPS", _interval(figures.snips)),
            ("doubly robust", _interval(figures.doubly_robust)),
            ("champion", _interval(figures.champion)),
            ("lift", _interval(figures.lift)),
            (
                "mean weight",
                f"{figures.mean_weight:.3f} ± {figures.mean_weight_error:.3f}; the champion's "
                f"{figures.champion_mean_weight:.3f} ± {figures.champion_mean_weight_error:.3f}",
            ),
            (
                "effective size",
                f"{figures.effective_sample_size:,.0f}; the champion's {figures.champion_effective_sample_size:,.0f}; "
                f"{figures.effective_sample_size_needed:,.0f} needed of both",
            ),
        ]
    rows += [("guardrail", sentence) for sentence in rails.broken] or [("guardrails", "none is broken")]
    rows += [(f"no {item.move}", item.why_not) for item in found.moves if item.why_not is not None]
    return rows


def _interval(found: IntervalView) -> str:
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
