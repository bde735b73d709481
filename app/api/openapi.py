"""Completes the OpenAPI document that Litestar generates: schemas, request bodies, problem responses, typed profiles.

Handlers decode bodies by hand and return encoded JSON, so their signatures show neither the types of bodies nor the
names of features. `opt["body"]` of a route lists the structs of its body. `opt["required"]` lists parameters that a
program must send; the signature makes them optional, because the same route also serves an HTML page that opens without
them. `opt["problems"]` maps an error status to the reasons that no schema can express (a moment too far in the past,
two parameters that exclude each other), or to None if the status needs no explanation.

Invariants, on which code generators depend: input that matches its schema is rejected only for the reasons in
`opt["problems"]`. A field of a request is required only if a caller must send it. A field of a response is required
unless the service may leave it out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import Annotated, Any

import msgspec
from litestar import Litestar, MediaType, get
from litestar.enums import OpenAPIMediaType
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import SwaggerRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Server, Tag
from litestar.params import PathParameter
from litestar.router import Router
from msgspec import UNSET

import app
from app.api.dependencies import HttpRequest
from app.api.problems import MEDIA_TYPE, Problem
from app.api.request_parsing import JSON, NDJSON
from app.api.schemas import DETAILS, FEATURE_NAME, HistoryDecision, HistoryMoment
from app.events.validation import MAX_EVENTS
from app.features.clock import DAY_MS, rfc3339
from app.features.events import FEEDBACK, SERVED, TipEvent, TipServed
from app.features.ids import ID_PATTERN, MAX_ID_LENGTH
from app.features.registry import Registry
from app.features.schema import ProfileFeatures

ASSETS = "/schema/assets"
_REF = "#/components/schemas/{name}"
# Swagger UI has no dark colours of its own. Code samples are dark already.
_STYLE = """<style>
body { margin: 0 }
@media (prefers-color-scheme: dark) {
  html { background: #1c1c1c }
  #swagger-container { filter: invert(0.88) hue-rotate(180deg) }
  .highlight-code { filter: invert(1) hue-rotate(180deg) }
}
</style>"""

DESCRIPTIONS = {
    400: "The body is not valid JSON or UTF-8, or a query parameter is unknown, repeated or not allowed.",
    401: "The API key is missing or unknown.",
    403: "The API key lacks the scope.",
    404: "Not found.",
    408: "The body did not arrive within 30 seconds. Send the request again.",
    409: "The request conflicts with stored or running state.",
    413: "The body is larger than 8 MB.",
    415: "The media type or encoding of the body is not supported.",
    422: "The input is well-formed but invalid; `errors` lists each place and reason.",
    429: "The key's rate limit is exceeded. Retry after `Retry-After` seconds.",
    503: "The service is overloaded or a dependency does not answer. Retry after `Retry-After` seconds.",
    507: "The disk is full; nothing was stored. Retry after `Retry-After` seconds.",
}

# The date in every example of the document.
EXAMPLE_DAY = b"2026-04-25T"
_OF_BOTH = {"user_id": "ada", "tip_id": "t-1", "occurred_at": "2026-04-25T08:30:00+02:00"}
SERVED_EXAMPLE = {"subject": SERVED, "event_id": "e-1", **_OF_BOTH}
FEEDBACK_EXAMPLE = {"subject": FEEDBACK, "event_id": "e-2", **_OF_BOTH, "action": "completed", "dwell_ms": 7200}
_building = Lock()
Schema = dict[str, Any]
MAX_ROWID = 2**63 - 1
ROWID: Schema = {"maximum": MAX_ROWID}  # Litestar would convert it to a float, which rounds it
USER_ID: Schema = {"minLength": 1, "maxLength": MAX_ID_LENGTH, "pattern": ID_PATTERN}
OPTIONAL_ID: Schema = {"anyOf": [USER_ID, {"const": ""}]}  # browsers send empty fields of a form, too
ID_PREFIX: Schema = {"maxLength": MAX_ID_LENGTH, "pattern": r"^[^/\x00-\x1f\x7f-\x9f]*$"}
MOMENT: Schema = {"format": "date-time", "examples": ["2026-04-25T08:30:00+02:00"]}
UserId = Annotated[
    str, PathParameter(description="Percent-encoded; no `/`, and not `.` or `..`.", schema_extra=USER_ID)
]
CACHE_CONTROL: Schema = {
    "name": "Cache-Control",
    "in": "header",
    "required": False,
    "description": "With `stale-if-error=N` (RFC 5861), a request that would be answered 503 because the database does "
    "not answer gets cached values, if all were computed at most N seconds ago and have not expired. They may lack "
    "events of these N seconds, and the response says so in `Cache-Status` (RFC 9211). Other directives are ignored.",
    "schema": {"type": "string", "examples": ["stale-if-error=60"]},
}
UNPROVEN_HEADERS: Schema = {
    "Cache-Status": {"description": "`profiles; hit; detail=unproven`; else absent.", "schema": {"type": "string"}},
    "Age": {"description": "Likewise: of the oldest value, in seconds.", "schema": {"type": "integer", "minimum": 0}},
}


def openapi_config(*, root_path: str) -> OpenAPIConfig:
    """The title, tags and security of the OpenAPI document, and a Swagger page that loads nothing from other hosts."""
    assets = root_path + ASSETS
    return OpenAPIConfig(
        title="User profiles, served fresh",
        version=app.__version__,
        description=(
            "Profile features of the users of a to-do app, computed by SQL from tip events and cached. A response "
            "reflects every event acknowledged before the request. Errors are problem details (RFC 9457); times are "
            "RFC 3339 in UTC. A service that has no keys serves only programs on its own machine, and needs no header."
        ),
        path="/schema",
        servers=[Server(url=root_path or "/")],
        use_handler_docstrings=False,
        operation_id_creator=lambda handler, _method, _path: handler.handler_name,
        render_plugins=[
            _Page(
                path="/",
                favicon='<link rel="icon" href="data:,">',
                style=_STYLE,
                js_url=f"{assets}/swagger-ui-bundle.js",
                css_url=f"{assets}/swagger-ui.css",
                standalone_preset_js_url=f"{assets}/swagger-ui-standalone-preset.js",
            )
        ],
        tags=[
            Tag(name="Profiles", description="For the recommender. Scope `read`."),
            Tag(name="Events", description="For producers. Scope `write`."),
            Tag(name="Tips", description="Choose and write tips. Scope `read`."),
            Tag(name="Admin", description="Inspect, rebuild, erase; watch quality; roll out. Scope `admin`."),
            Tag(name="Operations", description="For probes and Prometheus. No key needed."),
        ],
        components=Components(
            security_schemes={"key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header")}
        ),
        security=[{"key": []}],
    )


@lru_cache(maxsize=1)  # it takes 80 ms, and changes once a day
def openapi_document(
    application: Litestar, registry: Registry, mirror: type[msgspec.Struct], day: int
) -> dict[str, Any]:
    """The complete OpenAPI document of an application, running or not, for the features of `registry` and their Struct
    `mirror`. Examples have the date before `day` (days since 1970), because the service rejects old events."""
    document = application.openapi_schema.to_schema()
    operations = [
        (route.path_format, method.lower(), document["paths"][route.path_format][method.lower()], handler)
        for route in application.routes
        for method, (handler, _) in getattr(route, "route_handler_map", {}).items()
        if method.lower() in document["paths"].get(route.path_format, {})
    ]
    results = [handler.parsed_fn_signature.return_type for *_, handler in operations]
    structs = {
        kind.annotation
        for result in results
        for kind in (result, *result.inner_types)
        if isinstance(kind.annotation, type) and issubclass(kind.annotation, msgspec.Struct)
    }
    structs.update(kind for *_, handler in operations for kind in handler.opt.get("body", ()))
    document["components"]["schemas"] = _schemas(sorted(structs, key=lambda kind: kind.__name__), registry, mirror)
    for path, method, operation, handler in operations:
        opt = handler.opt
        _describe(operation, opt, registry)
        content = {MEDIA_TYPE: {"schema": _ref("Problem")}}
        problems = {**dict.fromkeys(_statuses(path, method, opt)), **opt.get("problems", {})}
        for status, reasons in sorted(problems.items()):
            description = " ".join(filter(None, (DESCRIPTIONS[status], reasons)))
            operation["responses"][str(status)] = {"description": description, "content": content}
        if "scope" not in opt:
            operation["security"] = []
        if TipServed in (kinds := opt.get("body", ())):
            operation["requestBody"] = _events_body()
        elif kinds:
            either = [_ref(kind.__name__) for kind in kinds]
            body = {JSON: {"schema": either[0] if len(either) == 1 else {"anyOf": either}}}
            operation["requestBody"] = {"required": opt.get("body_required", True), "content": body}
    yesterday = rfc3339((day - 1) * DAY_MS)[:11].encode()
    completed: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document).replace(EXAMPLE_DAY, yesterday))
    return completed


def _schemas(
    structs: Sequence[type[msgspec.Struct]], registry: Registry, mirror: type[msgspec.Struct]
) -> dict[str, Schema]:
    """The schemas of the structs, and of the types that they refer to, by name. Schemas that list features are made
    from `registry` and its Struct `mirror`, because the structs in the code have only built-in features."""
    details = {entry.name: DETAILS[entry.dtype] for entry in registry}
    others = (*dict.fromkeys(details.values()), Problem, HistoryMoment, HistoryDecision, TipEvent)
    (*_, event), schemas = msgspec.json.schema_components([*structs, *others], ref_template=_REF)
    _, features = msgspec.json.schema_components([mirror], ref_template=_REF)
    schemas["ProfileFeatures"] = {**features[mirror.__name__], "title": ProfileFeatures.__name__}
    schemas["ProfileDetails"]["properties"] = {name: _ref(kind.__name__) for name, kind in details.items()}
    schemas["FeatureName"] = {"type": "string", "enum": list(registry.names), "description": "The name of a feature."}
    schemas["HistoryRequestRow"] = {"anyOf": [_ref("HistoryMoment"), _ref("HistoryDecision")]}
    schemas["TipEvent"] = event
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            default = field.pop("default", UNSET)
            if default is UNSET:
                continue
            if schema.get("additionalProperties") is not False:  # of a response, which has every field
                schema.setdefault("required", []).append(name)
            elif default is not None:
                field["description"] = f"{field.get('description', '')} Default: {json.dumps(default)}.".strip()
    return schemas


def _ref(name: str) -> Schema:
    return {"$ref": _REF.format(name=name)}


def _statuses(path: str, method: str, opt: Mapping[str, Any]) -> set[int]:
    """The error statuses that a route can answer with, as its scope, body, path and method imply."""
    scope, parameters = opt.get("scope"), set(re.findall(r"{(\w+)}", path))
    found = {400}
    if scope is not None:
        found |= {401, 403, 429, 503} if opt.get("rate_limited") else {401, 403, 503}
    if "body" in opt:
        found |= {408, 413, 415, 422}
    if parameters & {"user_id", "decision_id"}:
        found.add(422)
    if parameters - {"user_id"}:
        found.add(404)
    if method != "get" and scope in ("write", "admin"):
        found.add(507)
    return found


def _describe(operation: dict[str, Any], opt: Mapping[str, Any], registry: Registry) -> None:
    """Complete the parameters of an operation: which are required, which feature names are allowed, and that none may
    be null. If `opt["stale_if_error"]` is set, add the headers of `Cache-Control: stale-if-error`."""
    for parameter in operation.get("parameters", ()):
        schema = parameter["schema"]
        if "oneOf" in schema:  # of a parameter and null; a parameter that is left out has no value
            schema |= next(branch for branch in schema.pop("oneOf") if branch != {"type": "null"})
        if parameter["name"] in ("feature", "name"):
            parameter["schema"] = dict(FEATURE_NAME)
        elif parameter["name"] == "features":
            either = "|".join(registry.names)
            schema["pattern"] = f"^({either})(,({either}))*$"
        if parameter["name"] in opt.get("required", ()):
            parameter["required"] = True
            schema.pop("default", None)
    if kind := opt.get("ndjson"):
        line = {"type": "string", "contentMediaType": NDJSON, "contentSchema": _ref(kind.__name__)}
        response = operation["responses"]["200"]
        response["content"] = {JSON: response["content"][JSON], NDJSON: {"schema": line}}
        response["headers"] = {"Link": {"description": "The next page, if there is one.", "schema": {"type": "string"}}}
    if opt.get("stale_if_error"):
        others = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] != "header"]
        operation["parameters"] = [*others, CACHE_CONTROL]  # not appended: Litestar keeps the document
        operation["responses"]["200"]["headers"] = UNPROVEN_HEADERS


def _events_body() -> dict[str, Any]:
    several = {"type": "array", "items": _ref("TipEvent"), "minItems": 1, "maxItems": MAX_EVENTS}
    lines = {
        "type": "string",
        "format": "binary",
        "description": f"One `TipEvent` as JSON on each line, at most {MAX_EVENTS:,}.",
        "contentMediaType": NDJSON,
        "contentSchema": several,
    }
    examples = {
        "served": {"summary": "A tip was shown to a user", "value": SERVED_EXAMPLE},
        "feedback": {"summary": "The user gave feedback on a tip", "value": FEEDBACK_EXAMPLE},
        "many": {"summary": "Several events at once", "value": [SERVED_EXAMPLE, FEEDBACK_EXAMPLE]},
    }
    ndjson = "\n".join(json.dumps(event) for event in (SERVED_EXAMPLE, FEEDBACK_EXAMPLE))
    return {
        "required": True,
        "content": {
            JSON: {"schema": {"anyOf": [_ref("TipEvent"), several]}, "examples": examples},
            NDJSON: {"schema": lines, "example": ndjson},
        },
    }


def _complete(request: HttpRequest) -> dict[str, Any]:
    service = request.service
    with _building:  # one thread builds it, others wait for the result
        return openapi_document(request.app, service.registry, service.mirror, service.clock.now_ms() // DAY_MS)


def _json(request: HttpRequest) -> bytes:
    return msgspec.json.encode(_complete(request))


class _Page(SwaggerRenderPlugin):
    def receive_router(self, router: Router) -> None:
        """Replace Litestar's routes, which would build the document on the event loop. Its pages for OAuth, which is
        not used, and for unknown paths are left out."""
        router.routes.clear()
        router.register(get("/", media_type=MediaType.HTML, sync_to_thread=True)(self._page))
        router.register(get("/openapi.json", media_type=OpenAPIMediaType.OPENAPI_JSON, sync_to_thread=True)(_json))

    def _page(self, request: HttpRequest) -> bytes:
        options = b"docExpansion: 'none', defaultModelsExpandDepth: 0, deepLinking: true"
        return self.render(request, _complete(request)).replace(b"deepLinking: true", options)
