"""Routes of the catalogue of features, and to disable and enable a feature."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from litestar import Response
from litestar.params import PathParameter
from msgspec import Meta

from app.api.admin import WITH_REASON, admin_get, admin_post, audited, reason_of
from app.api.auth.forms import is_form
from app.api.dependencies import HttpRequest
from app.api.pages.negotiation import answer, redirect
from app.api.profiles import feature_entry
from app.api.schemas import FeatureEntry
from app.errors import Conflict, NotFound
from app.features.clock import rfc3339
from app.features.events import KNOWN_SUBJECTS
from app.features.export import FORMATS
from app.features.plan import Announced
from app.features.views import view

HOME = "/admin/features"
Name = Annotated[str, PathParameter(description="The name of a feature.")]


class ServedDefinition(msgspec.Struct):
    """A definition that processes have served for a feature, and when a process first and last reported it."""

    fingerprint: str
    first_seen: str
    last_seen: str


class FeatureDefinition(FeatureEntry):
    """An entry of the registry with its SQL and the definitions served under its name."""

    sql: Annotated[str, Meta(description="One set-based SELECT over `views` and `feedback`.")]
    seen: Annotated[list[ServedDefinition], Meta(description="Definitions served under this name, the newest first.")]


class ContractExport(msgspec.Struct):
    """The features' names, types and descriptions as text for callers: JSON Schema, Python or TypeScript."""

    format: str
    text: str


class Catalogue(msgspec.Struct):
    """The registry that is served. `subjects`: by event subject, the features that such an event invalidates."""

    registry: Annotated[str, Meta(description="The fingerprint of the whole registry.")]
    features: list[FeatureDefinition]
    subjects: dict[str, list[str]]
    exports: list[ContractExport]


class FeatureSwitch(msgspec.Struct):
    """The result of enabling or disabling a feature."""

    feature: str
    state: Annotated[str, Meta(description="`enabled` or `disabled`.")]
    detail: str


@admin_get(
    HOME,
    summary="The catalogue of features",
    description="The registry with its SQL, the subjects that invalidate each feature, its state and cost, the "
    "definitions that were served under its name, and the contract for other languages. A page for a browser.",
)
async def get_catalogue(request: HttpRequest) -> Response[Catalogue]:
    service = request.service
    announced = await service.registries.announced()
    registry = service.registry
    body = Catalogue(
        registry.fingerprint,
        [
            view(FeatureDefinition, feature_entry(service, index), sql=entry.compute, seen=_seen(announced, entry.name))
            for index, entry in enumerate(registry)
        ],
        {
            subject: [name for name in registry.names if name in registry.invalidated_by(subject)]
            for subject in sorted(KNOWN_SUBJECTS, reverse=True)  # a tip is `served` before there is `feedback`
        },
        [ContractExport(name, export(registry, service.mirror)) for name, export in FORMATS.items()],
    )
    return await answer(request, body, "features.html", measured=bool(service.costs))


def _seen(announced: Iterable[Announced], name: str) -> list[ServedDefinition]:
    moments: defaultdict[str, list[int]] = defaultdict(list)
    for known in announced:
        for item in known.definitions:
            if item.name == name:
                moments[item.fingerprint] += (known.first_seen_ms, known.last_seen_ms)
    newest_first = sorted(moments.items(), key=lambda item: -max(item[1]))
    return [ServedDefinition(found, rfc3339(min(times)), rfc3339(max(times))) for found, times in newest_first]


@admin_post(
    f"{HOME}/{{name:str}}/disable",
    **WITH_REASON,
    summary="Serve a feature as null",
    description="Every process serves it as null within a second, until it is enabled; cached values are not served. "
    "409 if it is disabled already.",
)
async def disable_feature(request: HttpRequest, name: Name) -> Response[FeatureSwitch]:
    return await _switch(request, name, on=False)


@admin_post(
    f"{HOME}/{{name:str}}/enable",
    **WITH_REASON,
    summary="Serve a feature again",
    description="409 if it is not disabled.",
)
async def enable_feature(request: HttpRequest, name: Name) -> Response[FeatureSwitch]:
    return await _switch(request, name, on=True)


async def _switch(request: HttpRequest, name: str, *, on: bool) -> Response[Any]:
    service, reason = request.service, await reason_of(request)
    if name not in service.registry.names:
        raise NotFound(f"there is no feature of that name; known are {', '.join(service.registry.names)}")
    done = f"{name} is served again." if on else f"{name} is served as null, in every process within a second."
    actor, now_ms = request.user.name, service.clock.now_ms()
    try:
        async with audited(request, "enable feature" if on else "disable feature", name) as act:
            act.outcome = await service.registries.switch(name, actor, reason, now_ms, on=on)
    except Conflict as error:
        if not is_form(request):
            raise
        done = f"Nothing was changed: {error}."
    if is_form(request):
        return await redirect(request, HOME, done)
    return Response(FeatureSwitch(name, "enabled" if on else "disabled", done))
