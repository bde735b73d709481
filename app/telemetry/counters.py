"""Counters and histograms for what every request counts, collected by prometheus-client like its own.

Its own take a lock for each figure, three of them for one observation: a sixth of the cost of a warm read. These are
added to by one thread, the event loop's, and read by any. A sum may be read between two additions; no addition is lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString


class FastCounter:
    """A counter."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._total = 0
        registry.register(self)

    def inc(self, by: int = 1) -> None:
        """Count."""
        self._total += by

    def collect(self) -> Iterator[Metric]:
        """For prometheus-client."""
        yield CounterMetricFamily(self._name, self._text, value=self._total)


class FastHistogram:
    """The observations of one set of labels. A bucket holds what is at most its bound."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class HistogramCollector:
    """A histogram with labels."""

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        self._labels = labels
        self._marks = [*map(floatToGoString, bounds), "+Inf"]
        self._spreads: dict[tuple[str, ...], FastHistogram] = {}
        registry.register(self)

    def labels(self, *values: object) -> FastHistogram:
        """The observations with these values of the labels, made where there are none yet."""
        key = tuple(map(str, values))
        spread = self._spreads.get(key)
        if spread is None:
            if len(key) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {', '.join(self._labels)}, not {values}")
            spread = self._spreads[key] = FastHistogram(self._bounds)
        return spread

    def collect(self) -> Iterator[Metric]:
        """For prometheus-client."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for key, spread in list(self._spreads.items()):
            buckets = list(zip(self._marks, map(float, accumulate(spread.counts)), strict=True))
            family.add_metric(key, buckets, spread.sum)
        yield family
