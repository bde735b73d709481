"""Routes for probes and Prometheus, and for `OPTIONS`. They need no key and reveal nothing about users."""

import re
from collections.abc import Sequence

from litestar import MediaType, Response, get, route
from litestar.enums import HttpMethod
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from prometheus_client import generate_latest

from app.api.dependencies import HttpRequest
from app.api.schemas import Health, Readiness

ALLOW = "allow"
STOPPING = "stopping"  # set in the application's state when the process is shutting down


@get("/healthz", tags=["Operations"], summary="Check that the process is alive")
async def healthz(request: HttpRequest) -> Health:
    return Health("alive")


@get(
    "/readyz",
    tags=["Operations"],
    summary="Check that the service can serve reads",
    description="Answers 200 with `ready`, or with `degraded` if reads are correct but a dependency does not answer. "
    "Answers 503 with `unavailable` if reads cannot be served, and with `stopping` during shutdown.",
    responses={
        503: ResponseSpec(
            Readiness,
            description="Reads cannot be served (`checks` has the reasons), or the process is shutting down.",
            generate_examples=False,
        )
    },
)
async def readyz(request: HttpRequest) -> Response[Readiness]:
    checks = await request.service.readiness()
    shown = {name: "ok" if check.ok else check.detail for name, check in checks.items()}
    if request.app.state.get(STOPPING):
        return Response(Readiness("stopping", shown), status_code=503)
    if any(check.vital and not check.ok for check in checks.values()):
        return Response(Readiness("unavailable", shown), status_code=503, headers={"Retry-After": "1"})
    return Response(Readiness("ready" if all(check.ok for check in checks.values()) else "degraded", shown))


@get("/metrics", media_type=MediaType.TEXT, tags=["Operations"], summary="Get metrics in Prometheus' text format")
async def metrics(request: HttpRequest) -> Response[bytes]:
    service = request.service
    await service.refresh_gauges()
    shown = generate_latest(service.metrics.collectors)
    return Response(shown, media_type="text/plain; version=0.0.4")  # Litestar adds the charset


def options_of(handlers: Sequence[HTTPRouteHandler]) -> HTTPRouteHandler:
    """A handler that answers `OPTIONS` for all paths of `handlers`. Register it before them. Litestar's own handlers
    for `OPTIONS` cover only the first handler of a path, include methods for HTML forms, lack HEAD, and are slow."""
    documented: dict[str, set[str]] = {}
    forms: dict[str, set[str]] = {}
    for handler in handlers:
        methods = forms if handler.include_in_schema is False else documented
        for path in handler.paths:
            methods.setdefault(path, set()).update(handler.http_methods)
    found = {**forms, **documented}
    allowed = {re.sub(r":\w+}", "}", path): _listed(methods) for path, methods in found.items()}

    @route([*found], http_method=[HttpMethod.OPTIONS], status_code=204, include_in_schema=False, opt={ALLOW: allowed})
    async def options(request: HttpRequest) -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allowed[request.scope["path_template"]]})

    return options


def allow_of(handler: BaseRouteHandler, path_template: str, default: str) -> str:
    """The value of the header `Allow` for a path whose `OPTIONS` handler is `handler`. If `options_of` did not make
    this handler, the value is Litestar's value `default`, completed with HEAD and OPTIONS."""
    return str(handler.opt.get(ALLOW, {}).get(path_template) or _listed({*default.split(", ")}))


def _listed(methods: set[str]) -> str:
    return ", ".join(sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())))
