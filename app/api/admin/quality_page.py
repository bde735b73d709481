"""What the pages of data quality show besides the figures: histograms, words for the drift, and the runs so far."""

from __future__ import annotations

from typing import NamedTuple

from app.features.registry import Registry
from app.profiles.quality.drift import CommonBin
from app.profiles.quality.report import Drift, FeatureQuality


class DriftBadge(NamedTuple):
    """A drift in words, with the kind of badge that says the same by its colour."""

    words: str
    kind: str


class BinRow(NamedTuple):
    """A bin with its share of each population."""

    label: str
    now: int
    now_share: float | None
    before: int
    before_share: float | None


class FeatureCard(NamedTuple):
    """One feature's part of the page. `series` are percentages over `labels`; `spoken` says them in words."""

    name: str
    description: str
    figures: FeatureQuality
    verdict: DriftBadge
    bins: list[BinRow]
    labels: list[str]
    series: dict[str, list[float]]
    spoken: str


def cards(features: dict[str, FeatureQuality], registry: Registry) -> list[FeatureCard]:
    """A card a feature, in the order of the registry; one of another release says nothing of itself."""
    described = {entry.name: (entry.description, entry.dtype == "int") for entry in registry}
    return [_card(name, *described.get(name, ("", False)), figures) for name, figures in features.items()]


def _card(name: str, description: str, whole: bool, figures: FeatureQuality) -> FeatureCard:
    bins = rows(figures.drift.bins, whole=whole)
    series = {
        "now": [round(100 * (row.now_share or 0), 2) for row in bins],
        "7 days before": [round(100 * (row.before_share or 0), 2) for row in bins],
    }
    spoken = f"{name}, share of users by value: {_most(bins)}. The table below has every figure."
    labels = [row.label for row in bins]
    return FeatureCard(name, description, figures, verdict(figures.drift), bins, labels, series, spoken)


def _most(bins: list[BinRow]) -> str:
    """The commonest value of each population."""
    told = []
    for when, shares in (
        ("now", [row.now_share for row in bins]),
        ("7 days before", [row.before_share for row in bins]),
    ):
        top = max((share or 0, -place) for place, share in enumerate(shares)) if shares else (0.0, 0)
        told.append(f"{when} most have {bins[-top[1]].label} ({top[0]:.0%})" if top[0] else f"{when} there is none")
    return ", ".join(told)


def verdict(drift: Drift) -> DriftBadge:
    """The band in words."""
    if drift.band == "failed":
        return DriftBadge("failed", "bad")
    if drift.psi is None:
        return DriftBadge("no figure", "none")
    if drift.band == "stable":
        return DriftBadge("stable", "good")
    return DriftBadge("moderate drift", "warn") if drift.band == "moderate" else DriftBadge("major drift", "bad")


def rows(bins: list[CommonBin], *, whole: bool) -> list[BinRow]:
    """Bins with shares; None where a population is empty. `whole`: of whole numbers."""
    now, before = sum(part.now for part in bins), sum(part.before for part in bins)
    return [
        BinRow(
            label(part, whole=whole),
            part.now,
            part.now / now if now else None,
            part.before,
            part.before / before if before else None,
        )
        for part in bins
    ]


def label(part: CommonBin, *, whole: bool) -> str:
    """What a bin is called; one of whole numbers by its first and its last."""
    if part.kind in ("null", "other"):
        return part.kind
    if part.kind == "value":
        return str(part.value) if isinstance(part.value, str) else _plain(part.value)
    if part.start is None and part.end is None:
        return "any"
    if part.start is None:
        return f"< {_plain(part.end)}"
    if part.end is None:
        return f"≥ {_plain(part.start)}"
    end = part.end - 1 if whole else part.end
    return _plain(part.start) if end == part.start else f"{_plain(part.start)}–{_plain(end)}"


def _plain(number: float | None) -> str:
    if number is None:
        return ""
    if number and abs(number) >= 1_000 and number % 100 == 0:
        return f"{number / 1_000:.6g}k"
    return f"{number:.6g}"
