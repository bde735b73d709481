"""Routes of stored decisions: a list that can be searched, one decision with its explanation, and the decision log."""

import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote, urlencode

import msgspec
from litestar import Response
from litestar.params import QueryParameter

from app.api.admin import admin_get
from app.api.dependencies import HttpRequest
from app.api.openapi import MOMENT, OPTIONAL_ID
from app.api.pages.negotiation import answer, prefers, prefers_page, redirect
from app.api.request_parsing import NDJSON, check_ids, moment_ms
from app.api.scoring import DecisionAnswer, DecisionId, explanation
from app.bandit.decisions import DecisionLine, DecisionRecord
from app.bandit.ports import EARLIEST_MS, LATEST_MS, DecisionMoment
from app.errors import InvalidInput, Issue, Undecodable
from app.service import Service

HOME = "/admin/decisions"
LINES_PER_PAGE, RECORDS_PER_PAGE = 50, 100
LEAST = 0.00005  # smaller contributions to a score are not shown
BEFORE: dict[str, Any] = {"pattern": "^[0-9]{1,15}-[0-9]{1,18}$"}
# 18 digits: every time between `EARLIEST_MS` and `LATEST_MS`.
CURSOR: dict[str, Any] = {"pattern": "^(-?[0-9]{1,18})-([0-9A-Za-z-]{1,128})$"}
TIME: dict[str, Any] = {"anyOf": [MOMENT, {"const": ""}]}
# What an input of the type `datetime-local` sends.
_WITHOUT_OFFSET = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?", re.ASCII)


class DecisionLines(msgspec.Struct):
    """A page of decisions, newest first. Continue with `before=next_before`, which is null on the last page."""

    decisions: list[DecisionLine]
    next_before: str | None


class DecisionLogPage(msgspec.Struct):
    """A page of the decision log, oldest first. Continue with `cursor=next_cursor`, which is null on the last page."""

    decisions: list[DecisionRecord]
    next_cursor: str | None


class InputGroup(NamedTuple):
    """The inputs whose names begin with the factor `name`, such as `volume_x_priority` for `volume`. `parts`: what each
    input adds to a candidate's score. `total`: the sum of the parts."""

    name: str
    total: float
    parts: dict[str, float]


@admin_get(
    HOME,
    summary="Find decisions",
    description="The stored decisions, newest first; those of one user in the order in which they were stored. "
    "A page for a browser, which `decision_id` redirects to that decision.",
    problems={422: "An id is invalid."},
)
async def find_decisions(
    request: HttpRequest,
    decision_id: Annotated[
        str, QueryParameter(description="Only this decision, whatever else is asked for.", schema_extra=OPTIONAL_ID)
    ] = "",
    user_id: Annotated[str, QueryParameter(description="Only decisions for this user.", schema_extra=OPTIONAL_ID)] = "",
    since: Annotated[
        str,
        QueryParameter(description="Only decisions made from this time on; UTC without an offset.", schema_extra=TIME),
    ] = "",
    until: Annotated[str, QueryParameter(description="Only decisions made before this time.", schema_extra=TIME)] = "",
    before: Annotated[str | None, QueryParameter(description="`next_before` of a page.", schema_extra=BEFORE)] = None,
) -> Response[DecisionLines]:
    wanted = {"decision_id": decision_id, "user_id": user_id, "since": since, "until": until}
    context: dict[str, Any] = {"wanted": wanted, "faults": (), "first": before is None}
    try:
        body = await _found(request.service, wanted, before)
    except (InvalidInput, Undecodable) as error:
        if not prefers_page(request):
            raise
        context |= {"status_code": 400 if isinstance(error, Undecodable) else 422, "faults": error.issues}
        body = DecisionLines([], None)
    if decision_id and body.decisions and prefers_page(request):
        return await redirect(request, f"{HOME}/{quote(decision_id, safe='')}")
    return await answer(request, body, "decisions.html", **context)


@admin_get(
    f"{HOME}/{{decision_id:str}}",
    summary="Look at a decision",
    description="The same as `GET /decisions/{decision_id}`. A page for a browser.",
)
async def inspect_decision(request: HttpRequest, decision_id: DecisionId) -> Response[DecisionAnswer]:
    body = explanation(*await request.service.bandit.scorer.explain(decision_id))
    ranked = sorted(body.candidates, key=lambda item: -item.score)
    groups = {item.id: grouped(item.contributions) for item in ranked if item.contributions is not None}
    totals = [group.total for parts in groups.values() for group in parts]
    return await answer(
        request,
        body,
        "decision.html",
        # The chosen candidate, then the others that could have been chosen.
        ranked=ranked,
        explained=[item for item in ranked if item.id == body.chosen_id]
        + [item for item in ranked if item.id != body.chosen_id and item.probability > 0],
        other={item.id: item.probability for item in body.shadow.candidates} if body.shadow is not None else {},
        groups=groups,
        least=f"{LEAST:f}".rstrip("0"),
        low=min([0.0, *totals]),
        high=max([LEAST, *totals]),
    )


@admin_get(
    "/decisions",
    ndjson=DecisionRecord,
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
    records, last = await request.service.bandit.decisions.page(after, until_ms, RECORDS_PER_PAGE)
    headers, following = {"Vary": "Accept"}, None
    if last is not None:
        following = f"{last.at_ms}-{last.decision_id}"
        query = urlencode({"cursor": following} | ({"until": until} if until is not None else {}))
        headers["Link"] = f'<{request.service.settings.root_path}/decisions?{query}>; rel="next"'
    # Encoding a page takes milliseconds. Between two records, the event loop can run; within one call it could not.
    encoded = await asyncio.to_thread(lambda: [msgspec.json.encode(record) for record in records])
    if prefers(request, NDJSON):
        lines: Any = b"".join([record + b"\n" for record in encoded])
        return Response(lines, media_type=NDJSON, headers=headers)
    body: Any = b'{"decisions":[%b],"next_cursor":%b}' % (b",".join(encoded), msgspec.json.encode(following))
    return Response(body, headers=headers)


async def _found(service: Service, wanted: Mapping[str, str], before: str | None) -> DecisionLines:
    """Find decisions by the parameters `wanted`. Raises `Undecodable` or `InvalidInput` if a parameter is invalid."""
    for name in ("decision_id", "user_id"):
        if wanted[name]:
            check_ids([wanted[name]], name)
    since_ms = _utc_ms(wanted["since"], "since") if wanted["since"] else EARLIEST_MS
    until_ms = _utc_ms(wanted["until"], "until") if wanted["until"] else LATEST_MS
    place = (LATEST_MS, LATEST_MS)
    if before is not None:
        if re.fullmatch(BEFORE["pattern"], before) is None:
            raise Undecodable("before is invalid", [Issue("before", "must be the next_before of another page")])
        at_ms, _, number = before.partition("-")
        place = int(at_ms), int(number)
    decisions = service.bandit.decisions
    if wanted["decision_id"]:
        found = await decisions.line(wanted["decision_id"])
        return DecisionLines([found] if found is not None else [], None)
    lines, more = await decisions.newest(
        LINES_PER_PAGE, user_id=wanted["user_id"] or None, since_ms=since_ms, until_ms=until_ms, before=place
    )
    return DecisionLines(lines, more and f"{more[0]}-{more[1]}")


def _utc_ms(text: str, name: str) -> int:
    if _WITHOUT_OFFSET.fullmatch(text):
        text += "Z" if text.count(":") == 2 else ":00Z"
    return moment_ms(text, name)


def grouped(contributions: Mapping[str, float]) -> list[InputGroup]:
    """Group the inputs by the factor with which their names begin (see `InputGroup`). The group with the largest
    absolute sum comes first. Inputs that change the score by less than `LEAST` are left out."""
    groups: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for name, part in contributions.items():
        if abs(part) >= LEAST:
            groups[name.partition("_x_")[0]][name] = part
    found = [InputGroup(name, sum(parts.values()), parts) for name, parts in groups.items()]
    return sorted(found, key=lambda group: -abs(group.total))
