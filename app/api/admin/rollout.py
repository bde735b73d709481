"""The routes and page of the roll-out of the challenger policy: its state, and moving it from stage to stage."""

from typing import Any

from litestar import Response

from app.api.admin import WITH_REASON, admin_get, admin_post, audited, reason_of
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest
from app.api.pages.negotiation import answer, redirect
from app.bandit.rollout.controller import ACTIONS, NEWEST, WORKER
from app.bandit.rollout.stages import SERVED_BEFORE_MORE, STEPS, Move, Stage
from app.bandit.rollout.status import RolloutStatus
from app.errors import Conflict
from app.features.clock import rfc3339

HOME = "/admin/rollout"
# What a form holds in place of the time of the last change, if there was none.
UNCHANGED = "unchanged"
# What the page shows besides the state.
SHOWN = dict[str, Any](steps=STEPS, unchanged=UNCHANGED, newest=NEWEST, served_needed=SERVED_BEFORE_MORE, worker=WORKER)
RESULTS: dict[Stage, str] = {
    "shadow": "The roll-out starts again in the shadow.",
    "ramp": "The challenger now serves {share:.0%} of the users.",
    "promoted": "The challenger is promoted.",
    "rolled back": "The challenger is rolled back. The champion now serves every user.",
}


@admin_get(
    HOME,
    summary="The state of the roll-out",
    description="Off-policy estimates of the newest look (interim analysis) with their intervals, guardrails as they "
    "are now, the verdict with its reason, all looks so far, and which moves are allowed. Reading makes no look. "
    "A page for a browser.",
)
async def get_rollout(request: HttpRequest) -> Response[RolloutStatus]:
    return await answer(request, await request.service.bandit.rollout.status(), "rollout.html", **SHOWN)


@admin_post(
    f"{HOME}/ramp",
    **WITH_REASON,
    summary="Let the challenger serve more users",
    description="One step: 5 %, 25 %, 100 % of the users. After a rollback it starts again in the shadow. 409 if the "
    "verdict is not `promote`, or too few decisions were served at the stage before; the answer says which.",
)
async def ramp_rollout(request: HttpRequest) -> Response[RolloutStatus]:
    return await _move(request, "ramp")


@admin_post(
    f"{HOME}/promote",
    **WITH_REASON,
    summary="Let the challenger serve for good",
    description="409 unless it serves every user and an improvement is shown.",
)
async def promote_challenger(request: HttpRequest) -> Response[RolloutStatus]:
    return await _move(request, "promote")


@admin_post(
    f"{HOME}/rollback",
    **WITH_REASON,
    summary="Let the champion serve every user again",
    description="At any stage, with any verdict. Nothing that was learned is lost. 409 if it is rolled back already.",
)
async def roll_back(request: HttpRequest) -> Response[RolloutStatus]:
    return await _move(request, "rollback")


async def _move(request: HttpRequest, move: Move) -> Response[Any]:
    rollout, actor, reason = request.service.bandit.rollout, request.user.name, await reason_of(request)
    if not is_form(request):
        await rollout.move(move, actor, reason)
        return Response(await rollout.status())
    # Imported here because a request without a page must not pay for the templates.
    from app.api.pages.templating import spelled  # noqa: PLC0415

    try:
        state, seen = await rollout.repository.state(), (await read_form(request)).get("seen", "")
        outdated = seen not in ("", rfc3339(state.changed_at_ms) if state.changed_at_ms else UNCHANGED)
        # Without this, a second press of a button would move the roll-out another step. Two simultaneous requests may
        # both pass; the later move is then refused, because too few decisions were served at the new stage.
        if outdated and move != "rollback":
            async with audited(request, ACTIONS[move], "rollout"):
                to = f"{state.share:.0%} of the users" if state.stage == "ramp" else state.stage
                raise Conflict(
                    f"the roll-out has changed since this page was made: {state.changed_by} moved it to {to}"
                )
        state = await rollout.move(move, actor, reason)
        message = RESULTS[state.stage].format(share=state.share)
    except Conflict as error:
        message = f"Nothing was changed: {str(error).rstrip('.')}."
    return await redirect(request, HOME, spelled(message))
