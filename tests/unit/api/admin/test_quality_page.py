"""Labels of bins and drifts on the page."""

from app.api.pages.templating import bin_label, environment, percentages
from app.profiles.quality.drift import CommonBin
from app.profiles.quality.report import Drift

LABELS: list[tuple[CommonBin, bool, str]] = [
    (CommonBin(1, 1, start=0.1, end=0.2), False, "0.1–0.2"),
    (CommonBin(1, 1, start=5, end=10), True, "5–9"),
    (CommonBin(1, 1, start=5, end=6), True, "5"),
    (CommonBin(1, 1, start=5_000, end=10_000), False, "5k–10k"),
    (CommonBin(1, 1, start=None, end=-2.5), False, "< -2.5"),
    (CommonBin(1, 1, start=180, end=None), True, "≥ 180"),
    (CommonBin(1, 1, "value", 23), True, "23"),
    (CommonBin(1, 1, "value", 0), True, "0"),
    (CommonBin(1, 1, "value", "de"), False, "de"),
    (CommonBin(1, 1, "null"), False, "null"),
    (CommonBin(1, 1, "other"), False, "other"),
]


def test_bin_is_labelled_with_its_values() -> None:
    for part, whole, name in LABELS:
        assert bin_label(part, whole=whole) == name, part


def test_percentages_are_zero_when_the_population_is_empty() -> None:
    assert percentages([0, 0]) == [0, 0]
    assert percentages([1, 3]) == [25, 75]


def test_drift_has_words_and_a_colour() -> None:
    badge = environment().from_string('{% from "quality_macros.html" import drift_badge %}{{ drift_badge(drift) }}')
    for drift, words, kind in (
        (Drift(0.05, "stable", None, []), "stable", "good"),
        (Drift(0.2, "moderate", None, []), "moderate drift", "warn"),
        (Drift(0.5, "major", None, []), "major drift", "bad"),
        (Drift(None, None, "too few", []), "no figure", "none"),
        (Drift(None, "failed", "broken", [], 1), "failed", "bad"),
    ):
        assert badge.render(drift=drift) == f'<span class="badge {kind}">{words}</span>'
