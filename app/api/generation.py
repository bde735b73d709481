"""The route that words a tip.

Invariant: nothing that a profile lacks, and nothing that goes wrong while one is read, fails the request or makes it
wait; the tip is then worded for an unknown user.
"""

from __future__ import annotations

import asyncio

from litestar import post
from msgspec import UNSET

from app.api.dependencies import HttpRequest, service_of, tips_of
from app.api.generation_schemas import LOCALE, GeneratedTip, GenerateRequest
from app.api.openapi.document import problems
from app.api.request_parsing import body_as, check_ids, with_mirror
from app.errors import InvalidInput, Issue, Unavailable
from app.features.clock import EPOCH, MILLISECOND
from app.features.registry import Scalar
from app.generation.ports import Task, TipRequest
from app.generation.profile_traits import ALLOWED, traits_of
from app.service import Service
from app.telemetry import logger

PROFILE_S = 0.5
log = logger("api")


@post(
    "/generate",
    status_code=200,
    opt={"scope": "read", "body": [GenerateRequest]},
    tags=["Tips"],
    summary="Word a tip",
    description="A text about a task that fits its user: by the language model, where one is set and well, else by a "
    "template; `fallback_reason` says why the template stood in. Where `profile_features` is not given, the profile of "
    "`user_id` is read; `null` means none. Unknown features are ignored.",
    responses=problems(400, 401, 403, 413, 415, 422, 503),
)
async def post_generate(request: HttpRequest) -> GeneratedTip:
    """Word a tip."""
    service = service_of(request)
    asked = await body_as(request, with_mirror(GenerateRequest, service.mirror))
    check_ids([asked.task.id], "task.id")
    if asked.user_id is not None:
        check_ids([asked.user_id], "user_id")
    if LOCALE.fullmatch(asked.locale) is None:
        raise InvalidInput("the locale is not allowed", [Issue("locale", "must be a BCP 47 tag, as en, de-AT")])
    task = Task(title=asked.task.title, notes=asked.task.notes, due_at=asked.task.due_at, priority=asked.task.priority)
    traits = traits_of(await _features(service, asked))
    now = EPOCH + service.clock.now_ms() * MILLISECOND
    written = await tips_of(request).write(TipRequest(task=task, traits=traits, locale=asked.locale, now=now))
    return GeneratedTip(
        text=written.text,
        source="template" if written.model is None else "model",
        fallback_reason=written.reason or UNSET,
        model=written.model or UNSET,
        prompt_version=written.prompt_version,
    )


async def _features(service: Service, asked: GenerateRequest) -> dict[str, Scalar] | None:
    """The features sent; those of the user named, where none are sent; None where there are none."""
    sent = asked.profile_features
    if sent is None:
        return None
    if sent is not UNSET:
        return {name: value for name in ALLOWED if (value := getattr(sent, name, UNSET)) is not UNSET}
    return None if asked.user_id is None else await _read(service, asked.user_id)


async def _read(service: Service, user_id: str) -> dict[str, Scalar] | None:
    """A profile, where it is at hand soon; None while the service has too much to read, or cannot."""
    mask = service.registry.mask(name for name in ALLOWED if name in service.registry.names)
    if not mask:
        return None
    try:
        async with asyncio.timeout(PROFILE_S):
            return await service.reader.read_features(user_id, mask)
    except (TimeoutError, Unavailable) as error:
        log.info("worded_without_a_profile", error=str(error) or "it took too long")
        return None
