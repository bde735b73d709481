"""The producers' route."""

from __future__ import annotations

from litestar import post

from app.api.admin.auditing import caller
from app.api.auth.authentication import ANYONE
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.request_parsing import JSON, NDJSON, media_type
from app.api.schemas import EventsReceipt
from app.events.admission import decode_json, decode_lines
from app.features.events import TipFeedback, TipServed


@post(
    "/events",
    status_code=202,
    opt={"scope": "write", "body": [TipServed, TipFeedback]},
    tags=["Events"],
    summary="Send tip events",
    description="One event, an array of up to 1,000, or newline-delimited JSON. All are stored or none: one bad event "
    "refuses the request and names its index or line. When this answers 202 the events are durable, and the next read "
    "of these users' profiles, in any process, reflects them. Sending again is safe: `event_id` tells duplicates.",
    response_description="Stored for good, and reflected by every later read.",
    responses=problems(400, 401, 403, 409, 413, 415, 422, 503, 507),
)
async def post_events(request: HttpRequest) -> EventsReceipt:
    """Take events in."""
    kind = media_type(request, (JSON, NDJSON))
    body = await request.body()
    events = decode_lines(body) if kind == NDJSON else decode_json(body)
    receipt = await service_of(request).ingestor.ingest(events, _sender(request))
    return EventsReceipt(receipt.accepted, receipt.duplicates, receipt.invalidated)


def _sender(request: HttpRequest) -> str:
    who = caller(request)
    return "a caller without a key" if who == ANYONE else f"the key {who.name}"
