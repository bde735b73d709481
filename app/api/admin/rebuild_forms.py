"""What the forms of the rebuilds' pages send: a rebuild to start, one to cancel.

A form that cannot be carried out comes back as it was filled in, with what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from litestar import Response, post
from litestar.params import FromPath

from app.api.admin.rebuild_runs import cancel, start, status_of
from app.api.admin.schemas import RebuildList
from app.api.auth.forms import Form, read_form
from app.api.dependencies import HttpRequest, service_of
from app.api.pages.negotiation import page, redirect
from app.api.schemas import MAX_USERS
from app.errors import Conflict, InvalidInput, Issue
from app.features.ids import id_problem
from app.profiles.rebuild.runs import RebuildRun
from app.service import Service

SHOWN = 100


@dataclass(slots=True)
class Draft:
    """The form that starts a rebuild, as it is filled in, and what is wrong with it."""

    scope: str
    user_ids: str
    features: Sequence[str]
    issues: Sequence[Issue] = ()
    active: RebuildRun | None = None


def blank(service: Service) -> Draft:
    """The form before anybody has touched it: everyone, every feature."""
    return Draft("all", "", service.registry.names)


async def start_from_form(request: HttpRequest) -> Response[Any]:
    """Start a rebuild and go on to its page; or the form again, with what is wrong."""
    form = await read_form(request)
    draft = Draft(form.get("scope"), form.get("user_ids"), form.all("features"))
    try:
        user_ids = _user_ids(form)
        if not draft.features:
            raise InvalidInput("no feature", [Issue("features", "choose at least one")])
        asked = await start(request, user_ids, draft.features)
    except InvalidInput as error:
        draft.issues = error.issues or [Issue("features", str(error))]
        return await rebuilds_page(request, draft, status_code=422)
    if not asked.new:
        draft.active = asked.run
        return await rebuilds_page(request, draft, status_code=409)
    return await redirect(request, f"/admin/rebuilds/{asked.run.id}", "The rebuild is queued.")


def _user_ids(form: Form) -> list[str] | None:
    if form.get("scope") == "all":
        return None
    if form.get("scope") != "users":
        raise InvalidInput("say who", [Issue("scope", "choose everyone eligible, or a list of users")])
    lines = [(number, line.strip()) for number, line in enumerate(form.get("user_ids").splitlines(), start=1)]
    filled = [(number, line) for number, line in lines if line]
    issues = [Issue(f"line {number}", problem) for number, line in filled if (problem := id_problem(line))]
    if not filled:
        issues = [Issue("user_ids", "write one id a line")]
    users = list(dict.fromkeys(line for _, line in filled))
    if len(users) > MAX_USERS:
        issues = [Issue("user_ids", f"at most {MAX_USERS:,} users at once, not {len(users):,}")]
    if issues:
        raise InvalidInput("the list is not allowed", issues)
    return users


@post("/admin/rebuilds/{run_id:str}/cancel", status_code=200, opt={"scope": "admin"}, include_in_schema=False)
async def cancel_from_page(request: HttpRequest, run_id: FromPath[str]) -> Response[Any]:
    """Cancel one, and go back to its page."""
    await read_form(request)
    address = f"/admin/rebuilds/{quote(run_id, safe='')}"
    try:
        run = await cancel(request, run_id)
    except Conflict as error:
        return await redirect(request, address, f"Nothing was cancelled: {error}.")
    return await redirect(request, address, f"The rebuild is cancelled, at {run.done} of {run.total} users.")


async def rebuilds_page(request: HttpRequest, draft: Draft, *, status_code: int = 200) -> Response[Any]:
    """Everything about rebuilds: what runs, the form to start one, the history."""
    service = service_of(request)
    body = RebuildList([status_of(service, run) for run in await service.rebuild_runs.newest(SHOWN)])
    return await page(
        request,
        "rebuilds.html",
        status_code=status_code,
        body=body,
        draft=draft,
        features=list(service.registry),
        obstacles=await obstacles(service),
        most=MAX_USERS,
        shown_at_most=SHOWN,
        window_ms=service.registry.longest_window_ms(),
    )


async def obstacles(service: Service) -> list[str]:
    """Why nothing would be rebuilt just now."""
    checks = await service.readiness()
    said = []
    if not checks["queue"].ok:
        said.append("The queue does not answer: no worker hears of a rebuild until it does.")
    elif not checks["worker"].ok:
        said.append("No worker is alive: nothing is rebuilt until one is started (profiles worker).")
    if "cache" in checks and not checks["cache"].ok:
        said.append("The cache does not take anything in: a rebuild waits until it does, as nothing would be kept.")
    return said
