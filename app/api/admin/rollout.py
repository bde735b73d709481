"""Admins' routes about the roll-out of the challenger: how it does, and moving it from stage to stage."""

from __future__ import annotations

from typing import Any

from litestar import Response, get, post

from app.api.admin.auditing import audited, caller
from app.api.admin.reasons import WITH_REASON, Reason, reason_of
from app.api.auth.forms import is_form, read_form
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.pages.negotiation import answer, redirect
from app.bandit.rollout.controller import ACTIONS, NEWEST_SHOWN, WORKER
from app.bandit.rollout.stages import SERVED_BEFORE_MORE, STEPS, Move, RolloutState
from app.bandit.rollout.status import RolloutStatus
from app.errors import Conflict
from app.features.clock import rfc3339
from app.operations.audit import MAX_REASON

HOME = "/admin/rollout"
# The version that a form names before the first change.
UNCHANGED = "unchanged"


@get(
    HOME,
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="How the challenger does",
    description="Off-policy estimates of the newest look with their intervals, guardrails as they are now, the "
    "verdict with its reason, all looks so far, and which moves are allowed. Reading makes no look, however often. "
    "A page for a browser.",
    responses=problems(400, 401, 403, 503),
)
async def get_rollout(request: HttpRequest) -> Response[RolloutStatus]:
    """Now."""
    body = await service_of(request).bandit.rollout.status()
    return await answer(
        request,
        body,
        "rollout.html",
        chart=_chart(body),
        steps=STEPS,
        unchanged=UNCHANGED,
        max_reason=MAX_REASON,
        newest_shown=NEWEST_SHOWN,
        served_needed=SERVED_BEFORE_MORE,
        own_words=_own_words(body),
    )


@post(
    f"{HOME}/ramp",
    status_code=200,
    opt=WITH_REASON,
    tags=["Admin"],
    summary="Let the challenger serve more users",
    description="One step: 5 %, 25 %, 100 % of the users. Once rolled back, it begins anew in the shadow. 409 where "
    "the verdict is not `promote`, or too few decisions were served at the stage before; the answer says which.",
    responses=problems(400, 401, 403, 409, 413, 415, 422, 503, 507),
)
async def ramp_rollout(request: HttpRequest, reason: Reason = "") -> Response[RolloutStatus]:
    """One step."""
    return await _move(request, "ramp", reason)


@post(
    f"{HOME}/promote",
    status_code=200,
    opt=WITH_REASON,
    tags=["Admin"],
    summary="Let the challenger serve for good",
    description="Where it serves every user, and an improvement is shown; else 409.",
    responses=problems(400, 401, 403, 409, 413, 415, 422, 503, 507),
)
async def promote_challenger(request: HttpRequest, reason: Reason = "") -> Response[RolloutStatus]:
    """For good."""
    return await _move(request, "promote", reason)


@post(
    f"{HOME}/rollback",
    status_code=200,
    opt=WITH_REASON,
    tags=["Admin"],
    summary="Let the champion serve every user again",
    description="At any stage, whatever the verdict; nothing that was learned is lost. 409 where it is so already.",
    responses=problems(400, 401, 403, 409, 413, 415, 422, 503, 507),
)
async def roll_back(request: HttpRequest, reason: Reason = "") -> Response[RolloutStatus]:
    """Back."""
    return await _move(request, "rollback", reason)


async def _move(request: HttpRequest, move: Move, reason: str) -> Response[Any]:
    if is_form(request):
        return await _pressed(request, move)
    reason = await reason_of(request, reason)
    rollout = service_of(request).bandit.rollout
    await rollout.move(move, caller(request).name, reason)
    return Response(await rollout.status())


async def _pressed(request: HttpRequest, move: Move) -> Response[Any]:
    """What a button of the page does; the page then says what came of it."""
    form, reason = await read_form(request), await reason_of(request, "")
    try:
        if move != "rollback":  # going back is right, whatever happened meanwhile
            await _refuse_if_changed(request, move, form.get("seen"))
        state = await service_of(request).bandit.rollout.move(move, caller(request).name, reason)
    except Conflict as error:
        return await _back(request, f"Nothing was changed: {str(error).rstrip('.')}.")
    return await _back(request, _told(state))


async def _back(request: HttpRequest, said: str) -> Response[Any]:
    from app.api.pages.templating import spelled  # noqa: PLC0415  # as pages are: what no other request needs

    return await redirect(request, HOME, spelled(said))


async def _refuse_if_changed(request: HttpRequest, move: Move, seen: str) -> None:
    """A button pressed twice, or on an outdated page, would take a step that the admin did not ask for.

    Of two that come at the same moment both may pass; then the second is refused for want of decisions at its stage.
    """
    state = await service_of(request).bandit.rollout.repository.state()
    if seen in ("", rfc3339(state.changed_at_ms) if state.changed_at_ms else UNCHANGED):
        return
    async with audited(request, ACTIONS[move], "rollout"):
        at = f"{state.share:.0%} of the users" if state.stage == "ramp" else state.stage
        raise Conflict(f"since this page was made it has moved, to {at}, by {state.changed_by}")


def _told(state: RolloutState) -> str:
    """What a move has brought."""
    if state.stage == "ramp":
        return f"Done. The challenger serves {state.share:.0%} of the users from now on."
    if state.stage == "shadow":
        return "Done. The roll-out begins anew, in the shadow."
    if state.stage == "promoted":
        return "Done. The challenger is promoted."
    return "Done. The challenger is rolled back: the champion serves every user from now on."


def _own_words(body: RolloutStatus) -> bool:
    """Whether the newest change has no reason of an admin's, but the service's own words."""
    return body.changed_by == WORKER or body.reason in [look.verdict.reason for look in body.looks]


def _chart(body: RolloutStatus) -> dict[str, Any]:
    """The lift by look, with its bounds."""
    bounds = {
        "upper bound": [look.lift.high for look in body.looks],
        "lift": [look.lift.value for look in body.looks],
        "lower bound": [look.lift.low for look in body.looks],
        "margin": [-body.margin for _ in body.looks],
    }
    return {"labels": [f"{look.decisions:,}".replace(",", "\u202f") for look in body.looks], "series": bounds}
