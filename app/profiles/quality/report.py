"""The report: what a survey has found, as it is stored and shown. Every figure says what it is of.

Invariant: per feature, fresh + missing + stale = eligible, or all three are None, while the cache was away. The drift
needs no cache.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.features.clock import DAY_MS, rfc3339
from app.features.registry import Feature, Registry
from app.profiles.quality.drift import (
    MAX_CATEGORIES,
    CommonBin,
    band,
    common_bins,
    psi,
    too_few,
)
from app.profiles.quality.scan import BEFORE_DAYS, Figures, Survey
from app.profiles.quality.sketch import Sketch

AGE_SHARES = (0.5, 0.9, 0.99, 1.0)


class Ages(msgspec.Struct):
    """Ages of the live values, in milliseconds; to within 1 % where there are more than 512 different ones."""

    p50: int | None
    p90: int | None
    p99: int | None
    max: int | None


class Drift(msgspec.Struct):
    """The values that the SQL gives as of the measurement and as of 7 days before, each for those eligible then."""

    psi: Annotated[float | None, Meta(description="Population stability index over `bins`; null where `why_not` says.")]
    band: Annotated[
        Literal["stable", "moderate", "major", "failed"] | None,
        Meta(description="`failed`: values could not be computed, so the others say little."),
    ]
    why_not: Annotated[str | None, Meta(description="Why there is no figure.")]
    bins: list[CommonBin]
    failed: Annotated[int, Meta(description="Values that could not be computed; they are in no bin.")] = 0


class FeatureQuality(msgspec.Struct):
    """One feature over the eligible users; `fresh + missing + stale = eligible`. Null while the cache is away."""

    eligible: int
    fresh: int | None
    missing: int | None
    stale: int | None
    null_share: Annotated[float | None, Meta(description="Share of the live values that are null.")]
    ages_ms: Ages | None
    distribution: Annotated[list[dict[str, Any]] | None, Meta(description="The live values that are not null.")]
    drift: Drift


class QualityReport(msgspec.Struct):
    """What was found, at `measured_at_ms`, which is when the survey began: no figure is older than that."""

    measured_at_ms: int
    took_ms: int
    before_ms: int
    eligible: int
    eligible_before: int
    measured: Annotated[bool, Meta(description="False: the cache was away.")]
    features: dict[str, FeatureQuality]


def report(survey: Survey, registry: Registry, finished_at_ms: int) -> QualityReport:
    """What a survey that has reached its end found."""
    features = {entry.name: _feature(entry, survey, survey.features[entry.name]) for entry in registry}
    return QualityReport(
        survey.now_ms,
        max(0, finished_at_ms - survey.now_ms),
        survey.before_ms,
        survey.eligible,
        survey.eligible_before,
        survey.measured,
        features,
    )


def _feature(entry: Feature, survey: Survey, figures: Figures) -> FeatureQuality:
    drift = _drift(entry, survey, figures)
    if not survey.measured:
        return FeatureQuality(survey.eligible, None, None, None, None, None, None, drift)
    live = figures.fresh + figures.stale
    ages = [round(age) if age is not None else None for age in figures.ages_ms.quantiles(AGE_SHARES)]
    return FeatureQuality(
        survey.eligible,
        figures.fresh,
        figures.missing,
        figures.stale,
        figures.held.nulls / live if live else None,
        Ages(*ages),
        distribution(entry, figures.held),
        drift,
    )


def _drift(entry: Feature, survey: Survey, figures: Figures) -> Drift:
    bins = common_bins(entry.dtype, figures.now, figures.before)
    if figures.failed:
        values = f"{figures.failed:,} value{'' if figures.failed == 1 else 's'}"
        failed = f"{values} could not be computed: {figures.failure}"
        return Drift(None, "failed", failed, bins, figures.failed)
    why_not = _unreached(entry, survey) or too_few(bins)
    if why_not is not None:
        return Drift(None, None, why_not, bins)
    figure = psi(bins)
    return Drift(round(figure, 4), band(figure), None, bins)


def _unreached(entry: Feature, survey: Survey) -> str | None:
    """Why values of 7 days before mean nothing; None if they do."""
    if survey.history_from_ms is not None and survey.history_from_ms <= survey.before_ms - entry.window_ms:
        return None
    begun = f"begins at {rfc3339(survey.history_from_ms)}" if survey.history_from_ms is not None else "is empty"
    days = entry.window_ms / DAY_MS
    return f"the history {begun}; {BEFORE_DAYS} days before, the window of {days:g} days was not yet filled"


def distribution(entry: Feature, held: Sketch) -> list[dict[str, object]]:
    """Counts of the values that are not null: ten equal bins for floats and wide ints, else one a value.

    A bin is `{"from", "to", "count"}` (`to` belongs to the last bin only); a category `{"value", "count"}`.
    """
    if entry.dtype == "str":
        ranked = sorted(held.texts.items(), key=lambda item: -item[1])[:MAX_CATEGORIES]
        return [{"value": value, "count": count} for value, count in ranked]
    counts = held.counts()
    if held.low is None or held.high is None:
        return []
    if entry.dtype == "int" and held.exact and len(counts) <= MAX_CATEGORIES:
        return [{"value": int(number), "count": count} for number, count in counts]
    low = held.low
    width = (held.high - low) / 10 or 1.0
    bins = [0] * 10
    for number, count in counts:
        bins[min(9, max(0, int((number - low) / width)))] += count
    return [
        {"from": low + place * width, "to": low + (place + 1) * width, "count": count}
        for place, count in enumerate(bins)
    ]
