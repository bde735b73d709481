"""Labels of bins and drifts on the page."""

from __future__ import annotations

import pytest

from app.api.admin.quality import BinRow, label, rows, verdict
from app.profiles.quality.drift import CommonBin
from app.profiles.quality.report import Drift


@pytest.mark.parametrize(
    ("part", "whole", "name"),
    [
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
    ],
)
def test_bin_is_labelled_with_its_values(part: CommonBin, whole: bool, name: str) -> None:
    assert label(part, whole=whole) == name


def test_share_is_none_when_the_population_is_empty() -> None:
    bins = [CommonBin(1, 0, "value", 1), CommonBin(3, 0, "value", 2)]
    assert rows(bins, whole=True) == [BinRow("1", 1, 0.25, 0, None), BinRow("2", 3, 0.75, 0, None)]


def test_drift_has_words_and_a_colour() -> None:
    told = [verdict(Drift(0.05, "stable", None, [])), verdict(Drift(0.2, "moderate", None, []))]
    told += [verdict(Drift(0.5, "major", None, [])), verdict(Drift(None, None, "too few", []))]
    assert told == [("stable", "good"), ("moderate drift", "warn"), ("major drift", "bad"), ("no figure", "none")]
