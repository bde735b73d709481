"""Starting and cancelling rebuilds for an admin, whichever way they asked; and a run as it is shown."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from app.api.admin.auditing import audited, caller
from app.api.admin.schemas import RebuildStatus
from app.api.dependencies import HttpRequest, selected, service_of
from app.errors import Conflict, NotFound
from app.features.clock import rfc3339
from app.features.registry import indices
from app.profiles.rebuild.runs import RebuildRun, scope_of
from app.service import Service


class Start(NamedTuple):
    """What asking for a rebuild came to: the run, and whether it is a new one. If not, it was active already."""

    run: RebuildRun
    new: bool

    @property
    def refusal(self) -> str:
        """Why there is no new one."""
        run = self.run
        return f"rebuild {run.id} of the same scope is {run.state}, at {run.done} of {run.total}"


async def start(request: HttpRequest, user_ids: Sequence[str] | None, features: Sequence[str] | None) -> Start:
    """Start a rebuild of everyone eligible (None) or of these users; raises `UnknownFeature`."""
    service = service_of(request)
    mask = selected(service.registry, features)
    users = list(dict.fromkeys(user_ids)) if user_ids is not None else None
    now_ms = service.clock.now_ms()
    run = RebuildRun(
        id=secrets.token_hex(8),
        scope=scope_of(users),
        user_ids=users,
        features=[service.registry.names[index] for index in indices(mask)],
        state="queued",
        done=0,
        total=await service.rebuild_runner.total(users, mask),
        position="",
        requested_by=caller(request).name,
        created_at_ms=now_ms,
        started_at_ms=None,
        touched_at_ms=now_ms,
        finished_at_ms=None,
        error=None,
    )
    async with audited(request, "start rebuild", run.scope) as act:
        active = await service.rebuild_runs.open(run)
        outcome = Start(active or run, active is None)
        act.outcome = run.id if outcome.new else f"refused: {outcome.refusal}"
        if outcome.new:
            await service.start_rebuild(run.id)
    return outcome


async def cancel(request: HttpRequest, run_id: str) -> RebuildRun:
    """Cancel a run; how it is then.

    Raises:
        NotFound: there is none.
        Conflict: it has ended.
    """
    service = service_of(request)
    run = await found(service, run_id)
    async with audited(request, "cancel rebuild", run.scope) as act:
        if not await service.rebuild_runs.finish(run.id, "cancelled", service.clock.now_ms(), None):
            raise Conflict(f"rebuild {run.id} has ended: it is {(await found(service, run_id)).state}")
        act.outcome = run.id
    return await found(service, run_id)


async def found(service: Service, run_id: str) -> RebuildRun:
    """One run; raises `NotFound`."""
    run = await service.rebuild_runs.get(run_id)
    if run is None:
        raise NotFound(f"there is no rebuild {run_id}")
    return run


def status_of(service: Service, run: RebuildRun) -> RebuildStatus:
    """A run as it is shown."""
    rate, eta, took = None, None, None
    if run.started_at_ms is not None:
        until_ms = run.finished_at_ms or service.clock.now_ms()
        rate = run.done / max(0.001, (until_ms - run.started_at_ms) / 1000)
        if run.active and rate > 0:
            eta = max(0, run.total - run.done) / rate
        if run.finished_at_ms is not None:
            took = (run.finished_at_ms - run.started_at_ms) / 1000
    return RebuildStatus(
        run.id,
        run.scope,
        run.features,
        run.state,
        run.done,
        run.total,
        round(rate, 1) if rate is not None else None,
        round(eta, 1) if eta is not None else None,
        run.requested_by,
        rfc3339(run.created_at_ms),
        rfc3339(run.started_at_ms) if run.started_at_ms is not None else None,
        rfc3339(run.finished_at_ms) if run.finished_at_ms is not None else None,
        run.error,
        None if run.everyone else run.total,
        took,
    )
