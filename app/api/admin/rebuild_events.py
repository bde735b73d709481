"""A rebuild, live: server-sent events for whoever watches a run."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from litestar import Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath
from litestar.response import Stream

from app.api import event_stream
from app.api.admin.rebuild_runs import found, status_of
from app.api.admin.schemas import RebuildProgress
from app.api.dependencies import Api, HttpRequest, api_of
from app.api.openapi.document import problems
from app.profiles.rebuild.runs import RebuildRun

COME_BACK_MS = 1_000


@get(
    "/admin/rebuilds/{run_id:str}/events",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Follow a rebuild",
    description="Server-sent events named `progress`, each with the rebuild as `GET /admin/rebuilds/{run_id}` gives "
    "it: at once, and whenever it has changed. The stream ends with the rebuild, and after a minute; a browser comes "
    "back by itself. 204 tells one that has seen the end not to.",
    responses={
        200: ResponseSpec(
            RebuildProgress, description="Each event.", media_type=event_stream.MEDIA_TYPE, generate_examples=False
        ),
        204: ResponseSpec(None, description="It has ended, and `Last-Event-ID` says that this is known."),
        **problems(400, 401, 403, 404, 503),
    },
)
async def follow_rebuild(request: HttpRequest, run_id: FromPath[str]) -> Response[bytes] | Stream:
    """One."""
    api = api_of(request)
    run = await found(api, run_id)
    if not run.active and request.headers.get("last-event-id") == _id(run):
        return Response(b"", status_code=204)
    # Some proxies keep an answer until it is complete, unless told otherwise.
    return Stream(_events(api, run), media_type=event_stream.MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})


async def _events(api: Api, run: RebuildRun) -> AsyncGenerator[bytes, None]:
    yield event_stream.retry(COME_BACK_MS)
    async for state in api.watch.follow(run):
        if state is None:
            yield event_stream.HEARTBEAT
        else:
            yield event_stream.event("progress", _id(state), status_of(api, state))


def _id(run: RebuildRun) -> str:
    return f"{run.state}-{run.done}"
