"""The registry as a catalogue: each definition with its SQL, what invalidates it, and the contract to copy."""

from __future__ import annotations

from textwrap import dedent
from typing import Annotated

import msgspec
from litestar import Response, get
from msgspec import Meta

from app.api.admin.graph import drawn
from app.api.context import HttpRequest, api_of
from app.api.documents import problems
from app.api.pages.negotiation import answer
from app.api.schemas import FeatureEntry
from app.features.events import KNOWN_SUBJECTS
from app.features.export import FORMATS
from app.features.registry import Feature


class Definition(FeatureEntry):
    """An entry of the registry, whole."""

    window_s: Annotated[float, Meta(description="How far back in event time the SQL may look.")]
    sql: Annotated[str, Meta(description="One set-based SELECT over `views` and `feedback`.")]


class Export(msgspec.Struct):
    """The contract for one language."""

    format: str
    text: str


class Catalogue(msgspec.Struct):
    """What this service serves, and the subjects whose events make it untrue."""

    features: list[Definition]
    subjects: dict[str, list[str]]
    exports: list[Export]


def _definition(entry: Feature) -> Definition:
    return Definition(
        entry.name,
        entry.dtype,
        entry.ttl.total_seconds(),
        entry.default,
        entry.description,
        list(entry.invalidated_by),
        entry.fingerprint,
        entry.window.total_seconds(),
        dedent(entry.compute).strip(),
    )


@get(
    "/admin/features",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="The catalogue of features",
    description="The registry with its SQL, the subjects that invalidate each feature, and the contract for other "
    "languages. A page for a browser.",
    responses=problems(400, 401, 403),
)
async def get_catalogue(request: HttpRequest) -> Response[Catalogue]:
    """The registry."""
    api = api_of(request)
    names = list(api.registry.names)
    subjects = {
        subject: [name for name in names if name in api.registry.invalidated_by(subject)]
        for subject in sorted(KNOWN_SUBJECTS, reverse=True)  # `served` comes before `feedback` in a tip's life
    }
    exports = [Export(name, export(api.registry, api.mirror)) for name, export in FORMATS.items()]
    body = Catalogue([_definition(entry) for entry in api.registry], subjects, exports)
    return await answer(request, body, "features.html", graph=drawn(subjects, names))
