"""Reading a request to rank candidates; every refusal names the candidate or the feature that is at fault."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from app.api.dependencies import HttpRequest
from app.api.request_parsing import body_as, check_ids, issue_of, with_mirror
from app.api.scoring_schemas import ScoreCandidate, ScoreRequest
from app.bandit.decisions import MAX_CANDIDATES, Origin, ScoringRequest
from app.bandit.model.inputs import Candidate, Context, Profile
from app.errors import InvalidInput, Issue
from app.events.decoding import decode
from app.service import Service

_SOME_ITEM = "candidates["
# Of the longest list of candidates that can be right, ids without commas.
_MOST_COMMAS = MAX_CANDIDATES * 5
_CANDIDATE = msgspec.json.Decoder(ScoreCandidate)


class _Loose(msgspec.Struct):
    candidates: list[msgspec.Raw]


_decode_loose = msgspec.json.Decoder(_Loose).decode


async def asked_of(request: HttpRequest, service: Service) -> ScoringRequest:
    """What is asked.

    Raises:
        UnsupportedMedia, Undecodable, InvalidInput: as `body_as`, naming every candidate that is at fault.
    """
    try:
        sent = await body_as(request, with_mirror(ScoreRequest, service.mirror))
    except InvalidInput as error:
        if error.issues[0].path.startswith(_SOME_ITEM):  # the decoder stops at the first
            raise InvalidInput(str(error), _broken(await request.body()) or error.issues) from error
        raise
    check_ids([sent.user_id], "user_id")
    if sent.request_id is not None:
        check_ids([sent.request_id], "request_id")
    ids = [candidate.id for candidate in sent.candidates]
    check_ids(ids, "candidates[{}].id")
    if len(set(ids)) != len(ids):
        raise InvalidInput("candidates have the same id", _repeated(ids))
    origin, profile = _profile(service, sent)
    return ScoringRequest(
        user_id=sent.user_id,
        candidates=tuple(
            Candidate(item.id, item.features.is_overdue, item.features.task_age_days, item.features.priority)
            for item in sent.candidates
        ),
        context=Context(sent.context.at if sent.context is not None else None),
        origin=origin,
        profile=profile,
        explore=sent.explore,
        request_id=sent.request_id,
    )


def _profile(service: Service, sent: ScoreRequest) -> tuple[Origin, Profile]:
    features = sent.profile_features
    if features is UNSET:
        return "service", None
    if features is None:
        return "absent", None
    given = {name: getattr(features, name) for name in service.registry.names}
    return "request", {name: value for name, value in given.items() if value is not UNSET}


def _broken(body: bytes) -> list[Issue]:
    """Every candidate at fault, by its index; nothing where there are too many to look at each."""
    if body.count(b",") > _MOST_COMMAS:
        return []
    try:
        sent = _decode_loose(body).candidates
    except msgspec.ValidationError:  # the field is there twice, and the decoder had not come to the second
        return []
    issues: list[Issue] = []
    for index, raw in enumerate(sent):
        try:
            decode(raw, _CANDIDATE)
        except msgspec.ValidationError as error:
            found = issue_of(str(error))
            path = f"candidates[{index}]" + ("" if found.path == "$" else f".{found.path}")
            issues.append(Issue(path, found.detail))
    return issues


def _repeated(ids: Sequence[str]) -> list[Issue]:
    first: dict[str, int] = {}
    return [
        Issue(f"candidates[{index}].id", f"is that of candidates[{first[value]}] too")
        for index, value in enumerate(ids)
        if first.setdefault(value, index) != index
    ]
