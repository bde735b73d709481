"""The route that writes the text of a tip. If the profile cannot be read within `PROFILE_S`, the tip is written as for
an unknown user; the request neither fails nor waits longer."""

import asyncio
import re
from typing import Annotated

import msgspec
from litestar import post
from msgspec import UNSET, Meta, UnsetType

from app.api.dependencies import HttpRequest
from app.api.request_parsing import body_as, check_ids, with_mirror
from app.api.schemas import Moment
from app.errors import InvalidInput, Issue, Unavailable
from app.features.clock import EPOCH, MILLISECOND
from app.features.ids import Id
from app.features.registry import Scalar
from app.features.schema import ProfileFeatures
from app.features.views import view
from app.generation.generator import GeneratedTip
from app.generation.tip_request import ALLOWED, TipRequest, traits_of
from app.service import Service
from app.telemetry import logger

PROFILE_S = 0.5
LOCALE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}")
LOCALE_SCHEMA = {"pattern": f"^{LOCALE.pattern}$", "examples": ["de-AT"]}
log = logger("api")


class Task(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The task that the tip is about."""

    id: Id
    title: Annotated[str, Meta(min_length=1, max_length=300, examples=["Renew the passport"])]
    notes: Annotated[str, Meta(max_length=4_000, examples=["Photos first. The office opens at 8."])] | None = None
    due_at: Moment | None = None
    priority: Annotated[float, Meta(description="Higher is more important; 3 and above are important.")] | None = None


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request for the text of a tip about a task, written for a user."""

    task: Task
    user_id: Id | None = None
    profile_features: Annotated[
        ProfileFeatures | UnsetType | None,
        Meta(description="The user's profile. Not given: the profile of `user_id` is read. Null: no profile."),
    ] = UNSET
    locale: Annotated[
        str, Meta(description="A BCP 47 tag. Templates are German or English.", extra_json_schema=LOCALE_SCHEMA)
    ] = "en"


@post(
    "/generate",
    status_code=200,
    opt={"scope": "read", "body": [GenerateRequest]},
    tags=["Tips"],
    summary="Write the text of a tip",
    description="Returns a text about a task that suits its user. The language model writes it if one is configured. "
    "If the model fails, a template is used, and `fallback_reason` says why. Without `profile_features` the service "
    "reads the profile of `user_id`; `null` means no profile. Unknown features are ignored.",
)
async def post_generate(request: HttpRequest) -> GeneratedTip:
    service = request.service
    asked = await body_as(request, with_mirror(GenerateRequest, service.mirror))
    check_ids([asked.task.id], "task.id")
    if asked.user_id is not None:
        check_ids([asked.user_id], "user_id")
    if LOCALE.fullmatch(asked.locale) is None:
        raise InvalidInput("the locale is invalid", [Issue("locale", "must be a BCP 47 tag, such as en or de-AT")])
    traits, now = traits_of(await _features(service, asked)), EPOCH + service.clock.now_ms() * MILLISECOND
    return await request.parts.tips.write(view(TipRequest, asked, asked.task, traits=traits, now=now))


async def _features(service: Service, asked: GenerateRequest) -> dict[str, Scalar] | None:
    """The features from which the tip is written: `profile_features` if the request has the field, else the profile of
    `user_id`. None if the request has neither, or the profile cannot be read within `PROFILE_S`."""
    sent = asked.profile_features
    if sent is None:
        return None
    if sent is not UNSET:
        return {name: value for name in ALLOWED if (value := getattr(sent, name, UNSET)) is not UNSET}
    mask = service.registry.mask(name for name in ALLOWED if name in service.registry.names)
    if asked.user_id is None or not mask:
        return None
    try:
        async with asyncio.timeout(PROFILE_S):
            return await service.reader.read_features(asked.user_id, mask)
    except (TimeoutError, Unavailable) as error:
        log.info("generated_without_profile", error=str(error) or "timeout")
        return None
