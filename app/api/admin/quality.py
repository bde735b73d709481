"""Data quality: how true and how alive what the cache holds is."""

from __future__ import annotations

from litestar import get

from app.api.admin.schemas import Ages, FeatureQuality, Quality
from app.api.context import Api, HttpRequest, api_of
from app.api.documents import problems
from app.features.clock import rfc3339
from app.profiles.freshness import FeatureFreshness, distribution, percentiles


@get(
    "/admin/data-quality",
    opt={"scope": "admin"},
    tags=["Admin"],
    summary="Measure data quality",
    description="Over the users with any event in the last 30 days, per feature: how many values are fresh, missing "
    "or stale, how old they are and how they are distributed.",
    responses=problems(400, 401, 403, 503),
)
async def get_quality(request: HttpRequest) -> Quality:
    """All features."""
    api = api_of(request)
    report = await api.freshness.measure()
    features = {
        entry.name: _quality(api, index, report.features[entry.name], report.eligible, measured=report.measured)
        for index, entry in enumerate(api.registry)
    }
    return Quality(rfc3339(report.at_ms), report.eligible, features)


def _quality(api: Api, index: int, figures: FeatureFreshness, eligible: int, *, measured: bool) -> FeatureQuality:
    if not measured:
        return FeatureQuality(eligible, None, None, None, None, None, None)
    p50, p90, p99, most = percentiles(figures.ages_ms, (0.5, 0.9, 0.99, 1.0))
    live = figures.fresh + figures.stale
    return FeatureQuality(
        eligible,
        figures.fresh,
        figures.missing,
        figures.stale,
        figures.values[None] / live if live else None,
        Ages(p50, p90, p99, most),
        distribution(api.registry[index], figures.values),
    )
