"""The route for producers: `POST /events`."""

from collections.abc import Callable
from typing import Any

import msgspec
from litestar import Response, post

from app.api.auth.authentication import ANYONE
from app.api.dependencies import HttpRequest
from app.api.request_parsing import JSON, NDJSON, media_type
from app.api.schemas import EventsReceipt
from app.events.ingest import Ingestor
from app.events.validation import Batch, decode_json, decode_lines
from app.features.events import TipFeedback, TipServed
from app.settings.parsers import ApiKey


@post(
    "/events",
    status_code=202,
    opt={"scope": "write", "body": [TipServed, TipFeedback]},
    tags=["Events"],
    summary="Send tip events",
    description="Send one event, an array of up to 1,000, or newline-delimited JSON. Either all events are stored or "
    "none: one invalid event rejects the request, and `errors` names its index or line. After a 202 the events are "
    "durable, and every later read of these users, in any process, reflects them. Retrying is safe: an event with a "
    "known `event_id` of the same user counts as a duplicate.",
    response_description="The events are stored; every later read reflects them.",
    problems={
        409: "An event of the same user with the same `event_id` and other content is stored, or is in the request.",
        422: "Or an event is older than the retention, or lies more than five minutes in the future.",
    },
)
async def post_events(request: HttpRequest) -> Response[EventsReceipt]:
    kind = media_type(request, (JSON, NDJSON))
    body = await request.body()
    decode = decode_lines if kind == NDJSON else decode_json
    answer: Any = await ingest_body(request.service.ingestor, body, request.user, decode)
    return Response(answer)


async def ingest_body(
    ingestor: Ingestor, body: bytes, known: ApiKey, decode: Callable[[bytes], Batch] = decode_json
) -> bytes:
    """Store the events in a body that the caller sent, and encode the receipt."""
    sender = "a caller without a key" if known == ANYONE else f"the key {known.name}"
    receipt = await ingestor.ingest(decode(body), sender)
    return msgspec.json.encode(EventsReceipt(receipt.accepted, receipt.duplicates, receipt.invalidated))
