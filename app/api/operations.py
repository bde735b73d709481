"""Routes for probes and Prometheus. They need no key and reveal nothing about users."""

from __future__ import annotations

from litestar import MediaType, Response, get
from litestar.openapi.datastructures import ResponseSpec

from app.api.dependencies import HttpRequest, service_of
from app.api.schemas import Health, Readiness

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
        ),
    },
)
async def readyz(request: HttpRequest) -> Response[Readiness]:
    checks = await service_of(request).readiness()
    shown = {name: "ok" if check.ok else check.detail for name, check in checks.items()}
    if request.app.state.get(STOPPING):
        return Response(Readiness("stopping", shown), status_code=503)
    if any(check.vital and not check.ok for check in checks.values()):
        return Response(Readiness("unavailable", shown), status_code=503, headers={"Retry-After": "1"})
    return Response(Readiness("ready" if all(check.ok for check in checks.values()) else "degraded", shown))


@get(
    "/metrics",
    media_type=MediaType.TEXT,
    tags=["Operations"],
    summary="Get metrics in Prometheus' text format",
)
async def metrics(request: HttpRequest) -> Response[bytes]:
    service = service_of(request)
    await service.refresh_gauges()
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")  # Litestar adds the charset
