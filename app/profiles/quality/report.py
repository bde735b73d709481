"""The report of a data quality measurement, as it is stored and shown, and its computation from the counts.

An admin requests a *run* of the measurement, and a worker carries it out. At most one run is active. A run that a crash
interrupted is measured again from the beginning, after `STALE_MS`.

Invariant: for each feature, fresh + missing + stale = measured, or all three are None if the cache did not answer.
"""

import math
from collections import Counter
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from app.features.clock import DAY_MS, rfc3339
from app.features.registry import Feature, Registry, Scalar
from app.profiles.consistency.inspection import State
from app.profiles.quality.drift import CommonBin, band, common_bins, psi, quantiles, too_few
from app.telemetry import logger

KEPT = 10
STALE_MS = 35_000  # longer than a worker measures
Z_95 = 1.96
RunState = Literal["queued", "running", "completed", "failed"]
ShareInterval = Annotated[list[float], Meta(min_length=2, max_length=2, description="From and to, 95 % confidence.")]
log = logger("profiles.quality")


class Figures(msgspec.Struct):
    """The counts of one feature during a measurement. `states` counts the users by the state of their cached value.
    `ages_ms` has the ages of the cached values, and `held` counts them by value. `now` and `before` count the computed
    values. `failed` values could not be computed; `failure` is the first reason."""

    states: Counter[State | None] = msgspec.field(default_factory=Counter)
    ages_ms: list[int] = msgspec.field(default_factory=list)
    held: Counter[Scalar] = msgspec.field(default_factory=Counter)
    now: Counter[Scalar] = msgspec.field(default_factory=Counter)
    before: Counter[Scalar] = msgspec.field(default_factory=Counter)
    failed: int = 0
    failure: str = ""

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.failure = self.failure or reason


class UserSample(msgspec.Struct):
    """The users of a measurement, and the counts of their values by feature name. The users `now` were drawn from the
    `eligible` users with an event in the longest window before `now_ms`, and the users `before` from the
    `eligible_before` users with an event in the longest window before `before_ms`."""

    now_ms: int
    before_ms: int
    oldest_event_ms: int | None
    eligible: int
    now: list[str]
    eligible_before: int
    before: list[str]
    figures: dict[str, Figures]
    cache_answers: bool = True


class AgePercentiles(msgspec.Struct):
    """Percentiles of the ages of the measured users' cached values, in milliseconds; null if nothing is cached."""

    p50: int | None
    p90: int | None
    p99: int | None
    max: int | None


class Intervals(msgspec.Struct):
    """95 % confidence intervals of the shares of fresh, missing and stale values among all eligible users.

    `null` is the interval of the share of nulls among the cached values.
    """

    fresh: ShareInterval | None
    missing: ShareInterval | None
    stale: ShareInterval | None
    null: ShareInterval | None


class Drift(msgspec.Struct):
    """How far the values of a feature at the measurement differ from those 7 days before. Both are computed from the
    event log, each for a sample of users of its own. If the longest window of any feature is 30 days, one sample has
    users with an event in the 30 days before the measurement, the other in the 30 days before the earlier time."""

    psi: Annotated[
        float | None, Meta(description="Population stability index over `bins`; null if `why_not` says why.")
    ]
    band: Annotated[
        Literal["stable", "moderate", "major", "failed"] | None,
        Meta(description="`failed`: some values could not be computed, so the others may mislead."),
    ]
    why_not: Annotated[str | None, Meta(description="Why there is no figure.")]
    bins: list[CommonBin]
    failed: Annotated[int, Meta(description="Values that could not be computed; they are in no bin.")] = 0


class FeatureQuality(msgspec.Struct):
    """The data quality of one feature among the measured users: `fresh + missing + stale = measured`. These three, and
    everything else about the cached values, are null if the cache did not answer."""

    eligible: int
    measured: int
    fresh: int | None
    missing: int | None
    stale: int | None
    null_share: Annotated[float | None, Meta(description="Share of the live values that are null.")]
    intervals: Intervals | None
    ages_ms: AgePercentiles | None
    distribution: Annotated[list[dict[str, Any]] | None, Meta(description="The live values that are not null.")]
    drift: Drift


class QualityReport(msgspec.Struct):
    """Data quality at `measured_at`, for `measured` of the `eligible` users, drawn at random.

    A user with any event within the longest window is eligible. `eligible_before` and `measured_before` are the same
    numbers for `before_at`, 7 days before. The cache was read after `measured_at`.
    """

    measured_at: str
    took_s: float
    eligible: int
    measured: int
    before_at: str
    eligible_before: int
    measured_before: int
    margin: Annotated[
        float,
        Meta(description="A share differs by at most this from that of all eligible users, with 95 % confidence."),
    ]
    cache_answered: Annotated[bool, Meta(description="False: the contents of the cache are unknown.")]
    features: dict[str, FeatureQuality]


def report(sample: UserSample, registry: Registry, finished_at_ms: int) -> QualityReport:
    return QualityReport(
        rfc3339(sample.now_ms),
        max(0, finished_at_ms - sample.now_ms) / 1000,
        sample.eligible,
        len(sample.now),
        rfc3339(sample.before_ms),
        sample.eligible_before,
        len(sample.before),
        max(margin(len(sample.now), sample.eligible), margin(len(sample.before), sample.eligible_before)),
        sample.cache_answers,
        {entry.name: _feature(entry, sample, sample.figures[entry.name]) for entry in registry},
    )


def interval(count: float, measured: int, eligible: int, of: int | None = None) -> ShareInterval | None:
    """The 95 % confidence interval of a share among the `eligible` users, estimated from the share `count / of` among
    the `measured` users. `of` is the denominator if the share concerns only some of the measured users, such as those
    with a cached value. None if `of` is 0.

    E. B. Wilson's score interval (Probable inference, the law of succession, and statistical inference, 1927), with the
    correction for a finite population: if all are measured, the share is exact.
    """
    of = measured if of is None else of
    if not of:
        return None
    share = count / of
    if measured >= eligible:
        return [share, share]
    size = of / (1 - measured / eligible)
    shrink = 1 + Z_95**2 / size
    middle = (share + Z_95**2 / (2 * size)) / shrink
    half = Z_95 / shrink * math.sqrt(share * (1 - share) / size + (Z_95 / (2 * size)) ** 2)
    return [round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)]


def margin(measured: int, eligible: int) -> float:
    """The margin of error of a share: half the width of the interval in the worst case, a share of 50 %."""
    widest = interval(measured / 2, measured, eligible)
    return (widest[1] - widest[0]) / 2 if widest else 0.0


def _feature(entry: Feature, sample: UserSample, figures: Figures) -> FeatureQuality:
    drift, measured = _drift(entry, sample, figures), len(sample.now)
    if not sample.cache_answers:
        return FeatureQuality(sample.eligible, measured, None, None, None, None, None, None, None, drift)
    share = partial(interval, measured=measured, eligible=sample.eligible)
    fresh, missing, stale = (figures.states[state] for state in ("fresh", "missing", "stale"))
    live, nulls = fresh + stale, figures.held[None]
    return FeatureQuality(
        sample.eligible,
        measured,
        fresh,
        missing,
        stale,
        nulls / live if live else None,
        Intervals(share(fresh), share(missing), share(stale), share(nulls, of=live)),
        AgePercentiles(*quantiles(figures.ages_ms, (0.5, 0.9, 0.99, 1.0))),
        distribution(entry, figures.held),
        drift,
    )


def _drift(entry: Feature, sample: UserSample, figures: Figures) -> Drift:
    bins = common_bins(entry.dtype, figures.now, figures.before)
    if figures.failed:
        values = f"{figures.failed:,} value{'' if figures.failed == 1 else 's'}"
        failed = f"{values} could not be computed: {figures.failure}"
        return Drift(None, "failed", failed, bins, figures.failed)
    why_not = _unreached(entry, sample) or too_few(bins)
    if why_not is not None:
        return Drift(None, None, why_not, bins)
    figure = psi(bins)
    return Drift(round(figure, 4), band(figure), None, bins)


def _unreached(entry: Feature, sample: UserSample) -> str | None:
    """Why a feature cannot be computed as of `before_ms`; None if the event log holds the whole window."""
    oldest_ms = sample.oldest_event_ms
    if oldest_ms is not None and oldest_ms <= sample.before_ms - entry.window_ms:
        return None
    begun = f"begins at {rfc3339(oldest_ms)}" if oldest_ms is not None else "is empty"
    days, before_days = entry.window_ms / DAY_MS, (sample.now_ms - sample.before_ms) // DAY_MS
    return f"the history {begun}; {before_days} days before, the window of {days:g} days was not yet filled"


def distribution(entry: Feature, held: Counter[Scalar]) -> list[dict[str, object]]:
    """The counts of the values that are not null, as `{"value", "count"}` or `{"from", "to", "count"}`. Of texts, only
    the `MAX_CATEGORIES` most frequent are counted."""
    return [
        {"value": part.value, "count": part.now}
        if part.kind == "value"
        else {"from": part.start, "to": part.end, "count": part.now}
        for part in common_bins(entry.dtype, held, Counter())
        if part.kind == "range" or (part.kind == "value" and part.now)
    ]


class QualityRun(NamedTuple):
    """A stored run. `measured` is the number of users, 0 until the run is completed; `body` is the report as JSON."""

    id: int
    state: RunState
    requested_by: str
    requested_at_ms: int
    started_at_ms: int | None
    finished_at_ms: int | None
    measured: int
    body: str | None
    error: str | None

    @property
    def active(self) -> bool:
        return self.state in ("queued", "running")


class QualityRepository(Protocol):
    """Stores the runs of the data-quality measurement. Raises `StoreUnavailable`."""

    async def open(self, requested_by: str, now_ms: int) -> tuple[QualityRun, bool]:
        """Return the active run and False. If no run is active, store a new run, and return it and True."""

    async def newest(self, limit: int) -> list[QualityRun]:
        """Up to `limit` runs, newest first, without their reports."""

    async def newest_completed(self) -> QualityRun | None:
        """The newest run that has a report; None if there is none."""

    async def begin(self, run_id: int, now_ms: int) -> bool:
        """Mark a run as running; return False if it has ended, or if another worker began it up to `STALE_MS` ago."""

    async def release(self, run_id: int) -> None:
        """Queue a running run again, so that any worker can begin it."""

    async def finish(
        self, run_id: int, state: RunState, now_ms: int, *, measured: int = 0, body: str | None = None, error: str = ""
    ) -> bool:
        """Set the final state of a run and delete all but the last `KEPT` runs; return False if the run had ended."""


def readable_report(run: QualityRun) -> QualityReport | None:
    """The report of a completed run; None if a release wrote it in a form that this release cannot read."""
    try:
        return msgspec.json.decode(run.body or "", type=QualityReport)
    except msgspec.MsgspecError as error:
        log.warning("report_unreadable", run=run.id, error=str(error))
        return None
