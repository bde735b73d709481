"""For probes and Prometheus: alive, ready, metrics. They need no key and say nothing about users."""

from __future__ import annotations

from litestar import MediaType, Response, get
from litestar.openapi.datastructures import ResponseSpec

from app.api.dependencies import HttpRequest, service_of
from app.api.openapi.document import problems
from app.api.schemas import Health, Readiness

STOPPING = "stopping"  # in the application's state, once the process was told so


@get("/healthz", tags=["Operations"], summary="Is the process alive?", responses=problems(400))
async def healthz(request: HttpRequest) -> Health:
    """The event loop answers."""
    return Health("alive")


@get(
    "/readyz",
    tags=["Operations"],
    summary="Can it serve?",
    description="200 `ready` or `degraded` while reads are right; 503 when it cannot serve, or was told to stop.",
    responses={
        **problems(400),
        503: ResponseSpec(
            Readiness, description="It cannot serve (`checks` says why), or stops.", generate_examples=False
        ),
    },
)
async def readyz(request: HttpRequest) -> Response[Readiness]:
    """Ask everything it depends on."""
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
    summary="Metrics for Prometheus",
    responses=problems(400),
)
async def metrics(request: HttpRequest) -> Response[bytes]:
    """Prometheus' text format."""
    service = service_of(request)
    await service.refresh_gauges()
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")  # a charset is added
