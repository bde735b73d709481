"""What OpenAPI needs beyond the handlers' signatures: problem answers, request bodies, the typed profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from litestar.openapi import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin, SwaggerRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Server, Tag
from litestar.params import PathParameter
from litestar.router import Router
from msgspec import UNSET, Meta, UnsetType

import app
from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.parameters import describe, name_features
from app.api.problems import MEDIA_TYPE, Problem
from app.api.request_parsing import with_mirror
from app.api.schemas import FeatureDetail
from app.features.clock import DAY_MS, rfc3339
from app.features.events import FEEDBACK, SERVED, TipServed
from app.features.ids import MAX_ID_LENGTH

ASSETS = "/schema/assets"
_REF = "#/components/schemas/{name}"

DESCRIPTIONS = {
    400: "Not decodable: JSON, UTF-8, or a query value that is not allowed.",
    401: "No key, or one that is not known.",
    403: "The key lacks the scope.",
    404: "There is no such thing.",
    408: "The body did not come in within 30 seconds.",
    409: "It contradicts what is stored or running.",
    413: "The body is over 8 MB.",
    415: "The body is of another kind.",
    422: "Decodable, but invalid; `errors` names each place.",
    429: "More requests with this key than it may send; try again after `Retry-After` seconds.",
    503: "It cannot be served now; try again after `Retry-After` seconds.",
    507: "The disk is full; nothing was stored. Try again after `Retry-After` seconds.",
}


UserId = Annotated[
    str, PathParameter(description=f"1 to {MAX_ID_LENGTH} characters, percent-encoded; no `/`, `.` or `..`.")
]


class ProfileAnswer(msgspec.Struct):
    """A user's profile."""

    user_id: str
    features: dict[str, Any]


# How every example of a moment in the document begins.
EXAMPLE_DAY = b"2026-04-25T"
SERVED_EXAMPLE = {
    "subject": SERVED,
    "event_id": "e-1",
    "user_id": "ada",
    "tip_id": "t-1",
    "occurred_at": "2026-04-25T08:30:00+02:00",
}
FEEDBACK_EXAMPLE = {
    "subject": FEEDBACK,
    "event_id": "e-2",
    "user_id": "ada",
    "tip_id": "t-1",
    "occurred_at": "2026-04-25T08:31:12+02:00",
    "action": "completed",
    "dwell_ms": 7200,
}


class BatchAnswer(msgspec.Struct):
    """Profiles in the order asked."""

    profiles: list[ProfileAnswer]


class HistoryRow(msgspec.Struct):
    """A user's features at a moment."""

    user_id: str
    as_of: str
    features: dict[str, Any]


class HistoryAnswer(msgspec.Struct):
    """Rows in the order asked."""

    rows: list[HistoryRow]
    failed: Annotated[
        dict[str, str] | UnsetType,
        Meta(description="Features that could not be computed for every row, or are disabled: the reason by name."),
    ] = UNSET


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """The problem answers of a route."""
    return {
        status: ResponseSpec(Problem, description=DESCRIPTIONS[status], media_type=MEDIA_TYPE, generate_examples=False)
        for status in statuses
    }


def openapi_config(*, keys_required: bool, limited: bool, root_path: str) -> OpenAPIConfig:
    """The document's frame, and its page, which loads nothing from outside."""
    assets = root_path + ASSETS
    return OpenAPIConfig(
        title="User profiles, served fresh",
        version=app.__version__,
        description=(
            "Features of users of a to-do app, computed from tip events and never served older than the last event "
            "that was acknowledged. Errors are problem details (RFC 9457); times are RFC 3339 in UTC."
        ),
        path="/schema",
        servers=[Server(url=root_path or "/")],
        use_handler_docstrings=False,
        operation_id_creator=lambda handler, _method, _path: handler.handler_name,
        render_plugins=[
            _Page(
                limited=limited,
                path="/",
                favicon='<link rel="icon" href="data:,">',
                js_url=f"{assets}/swagger-ui-bundle.js",
                css_url=f"{assets}/swagger-ui.css",
                standalone_preset_js_url=f"{assets}/swagger-ui-standalone-preset.js",
            ),
            _Json(path="/openapi.json", limited=limited),
        ],
        tags=[
            Tag(name="Profiles", description="For the recommender. Scope `read`."),
            Tag(name="Events", description="For producers. Scope `write`."),
            Tag(name="Tips", description="Rank them, word one, explain a decision. Scope `read`."),
            Tag(name="Admin", description="Look, rebuild, erase, watch. Scope `admin`."),
            Tag(name="Operations", description="For probes and Prometheus. No key."),
        ],
        components=Components(
            security_schemes={"key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header")}
        ),
        security=[{"key": []}] if keys_required else None,
    )


def _completed(request: HttpRequest, document: dict[str, Any], *, limited: bool) -> dict[str, Any]:
    """The generated document with what is decoded by hand: request bodies, and the mirror as the profile's type.

    And with the problems that no route makes: whatever has a body may be given up, and all may be `limited`.
    """
    mirror, registry = service_of(request).mirror, service_of(request).registry
    operations = [
        (document["paths"][route.path_format][method.lower()], handler.opt)
        for route in request.app.routes
        for method, (handler, _) in getattr(route, "route_handler_map", {}).items()
        if method.lower() in document["paths"].get(route.path_format, {})
    ]
    kinds = [with_mirror(kind, mirror) for _, opt in operations for kind in opt.get("body", ())]
    _, components = msgspec.json.schema_components([*kinds, mirror, FeatureDetail], ref_template=_REF)
    schemas = {**document["components"]["schemas"], **components}
    _tell_numbers_apart(schemas)
    reference = {"$ref": _REF.format(name=mirror.__name__)}
    for name, schema in schemas.items():
        if name.endswith("ProfileAnswer"):
            details = {"$ref": _REF.format(name="FeatureDetail")}
            detailed = {"type": "object", "additionalProperties": details, "description": "With `detail=true`."}
            schema["properties"]["features"] = {"anyOf": [reference, detailed]}
        elif name.endswith("HistoryRow"):
            schema["properties"]["features"] = reference
    for kind in kinds:
        name_features(schemas[kind.__name__], registry)
    for operation, opt in operations:
        describe(operation, opt, registry)
        problem = operation["responses"]["400"]
        if limited and "scope" in opt:
            operation["responses"]["429"] = {**problem, "description": DESCRIPTIONS[429]}
        if "body" in opt:
            operation["responses"]["408"] = {**problem, "description": DESCRIPTIONS[408]}
        if "scope" not in opt:
            operation["security"] = []
        if kinds := opt.get("body"):
            operation["requestBody"] = (
                _events_body() if TipServed in kinds else _body(kinds, required=opt.get("body_required", True))
            )
    whole = {**document, "components": {**document["components"], "schemas": schemas}}
    return _of_yesterday(whole, rfc3339(service_of(request).clock.now_ms() - DAY_MS))


def _of_yesterday(document: dict[str, Any], yesterday: str) -> dict[str, Any]:
    """With yesterday in the place of `EXAMPLE_DAY`: an example that is older than the retention would be refused."""
    text = msgspec.json.encode(document).replace(EXAMPLE_DAY, yesterday[:11].encode())
    dated: dict[str, Any] = msgspec.json.decode(text)
    return dated


def _tell_numbers_apart(node: Any) -> None:
    """Where a value may be a float or an int, it matched two branches of a `oneOf`, which none may."""
    if isinstance(node, dict):
        branches = node.get("oneOf")
        if isinstance(branches, list) and {"type": "number"} in branches and {"type": "integer"} in branches:
            branches.remove({"type": "integer"})
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            _tell_numbers_apart(item)


def _body(kinds: Sequence[type[msgspec.Struct]], *, required: bool) -> dict[str, Any]:
    either = [{"$ref": _REF.format(name=kind.__name__)} for kind in kinds]
    schema = either[0] if len(either) == 1 else {"oneOf": either}
    return {"required": required, "content": {"application/json": {"schema": schema}}}


class _Json(JsonRenderPlugin):
    """The document."""

    def __init__(self, *, limited: bool, **options: Any) -> None:
        super().__init__(**options)
        self._limited = limited

    def render(self, request: HttpRequest, openapi_schema: dict[str, Any]) -> bytes:
        """As JSON."""
        return msgspec.json.encode(_completed(request, openapi_schema, limited=self._limited))


class _Page(SwaggerRenderPlugin):
    """The document, for people."""

    def __init__(self, *, limited: bool, **options: Any) -> None:
        super().__init__(**options)
        self._limited = limited

    def render(self, request: HttpRequest, openapi_schema: dict[str, Any]) -> bytes:
        """As a page."""
        return super().render(request, _completed(request, openapi_schema, limited=self._limited))

    def receive_router(self, router: Router) -> None:
        """Instead of a redirection page for OAuth, which is not used: what is not there is a problem, not a page."""
        router.routes[:] = [route for route in router.routes if not route.path.endswith("{path:str}")]


def _events_body() -> dict[str, Any]:
    one = {
        "oneOf": [{"$ref": _REF.format(name="TipServed")}, {"$ref": _REF.format(name="TipFeedback")}],
        "discriminator": {
            "propertyName": "subject",
            "mapping": {SERVED: _REF.format(name="TipServed"), FEEDBACK: _REF.format(name="TipFeedback")},
        },
    }
    several = {"type": "array", "minItems": 1, "maxItems": 1000, "items": one}
    many = {"anyOf": [one, several]}
    lines = {**several, "description": "One event a line."}  # what a line holds; OpenAPI 3.1 has no better words
    examples = {
        "served": {"summary": "A tip was put before a user", "value": SERVED_EXAMPLE},
        "feedback": {"summary": "The user reacted", "value": FEEDBACK_EXAMPLE},
        "many": {"summary": "Several at once", "value": [SERVED_EXAMPLE, FEEDBACK_EXAMPLE]},
    }
    ndjson = b"\n".join([msgspec.json.encode(SERVED_EXAMPLE), msgspec.json.encode(FEEDBACK_EXAMPLE)]).decode()
    return {
        "required": True,
        "content": {
            "application/json": {"schema": many, "examples": examples},
            "application/x-ndjson": {"schema": lines, "example": ndjson},
        },
    }
