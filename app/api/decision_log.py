"""The route that exports the decision log, in pages."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
from litestar import Response, get
from litestar.params import QueryParameter

from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import MOMENT
from app.api.pages.negotiation import prefers
from app.api.request_parsing import NDJSON, moment_ms
from app.bandit.decisions import DecisionRecord
from app.bandit.ports import EARLIEST_MS, LATEST_MS, DecisionMoment
from app.errors import Issue, Undecodable


class DecisionLogPage(msgspec.Struct):
    """A page of the decision log, oldest first. Continue with `cursor=next_cursor`, which is null on the last page."""

    decisions: list[DecisionRecord]
    next_cursor: str | None


DECISIONS_PER_PAGE = 100
# 18 digits: every time between `EARLIEST_MS` and `LATEST_MS`.
CURSOR: dict[str, Any] = {"pattern": "^(-?[0-9]{1,18})-([0-9A-Za-z-]{1,128})$"}


@get(
    "/decisions",
    opt={"scope": "admin", "ndjson": DecisionRecord},
    tags=["Admin"],
    summary="Export the decision log",
    description="The stored decisions in the order of their times, each with all that it was made from, and with its "
    "outcome, a hundred a page. With `Accept: application/x-ndjson` each decision is a line. The header `Link` "
    '(`rel="next"`) has the next page. A decision is stored shortly after its time, so the last seconds may be '
    "incomplete: end a minute ago with `until` to miss nothing.",
)
async def get_decisions(
    request: HttpRequest,
    since: Annotated[str | None, QueryParameter(description="Made at or after this time.", schema_extra=MOMENT)] = None,
    until: Annotated[str | None, QueryParameter(description="Made before this time.", schema_extra=MOMENT)] = None,
    cursor: Annotated[str | None, QueryParameter(description="The last `next_cursor`.", schema_extra=CURSOR)] = None,
) -> Response[DecisionLogPage]:
    after = DecisionMoment(moment_ms(since, "since") if since is not None else EARLIEST_MS)
    until_ms = moment_ms(until, "until") if until is not None else LATEST_MS
    if after.at_ms > until_ms:
        raise Undecodable("the period is invalid", [Issue("since", "must not be later than until")])
    if cursor is not None:
        if (parts := re.fullmatch(CURSOR["pattern"], cursor)) is None:
            raise Undecodable("cursor is invalid", [Issue("cursor", "must be the next_cursor of another page")])
        after = max(after, DecisionMoment(int(parts[1]), parts[2]))
    records, last = await service_of(request).bandit.decisions.page(after, until_ms, DECISIONS_PER_PAGE)
    headers, following = {"Vary": "Accept"}, None
    if last is not None:
        following = f"{last.at_ms}-{last.decision_id}"
        query = urlencode({"cursor": following} | ({"until": until} if until is not None else {}))
        headers["Link"] = f'<{service_of(request).settings.root_path}/decisions?{query}>; rel="next"'
    # Encoding a page takes milliseconds. Between two records, the event loop can run; within one call it could not.
    encoded = await asyncio.to_thread(lambda: [msgspec.json.encode(record) for record in records])
    if prefers(request, NDJSON):
        lines: Any = b"".join([record + b"\n" for record in encoded])
        return Response(lines, media_type=NDJSON, headers=headers)
    body: Any = b'{"decisions":[%b],"next_cursor":%b}' % (b",".join(encoded), msgspec.json.encode(following))
    return Response(body, headers=headers)
