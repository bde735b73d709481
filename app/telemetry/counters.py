"""Metrics without locks, for the request path, and gauges that may be absent.

The metrics of prometheus-client take three locks per observation, a sixth of the cost of a warm read. Those of this
module may be written only by the event loop's thread, and read by any thread. A scrape may find an observation in the
count of a histogram and not yet in its sum.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString


class FastCounter:
    def __init__(self, registry: CollectorRegistry, name: str, text: str) -> None:
        self._name = f"profiles_{name}"
        self._text = text
        self._total = 0
        registry.register(self)

    def inc(self, by: int = 1) -> None:
        self._total += by

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._total)


class OptionalGauge:
    """A gauge that is absent from a scrape while its value is unknown (None), as it is at first."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str) -> None:
        self._name = f"profiles_{name}"
        self._text = text
        self._value: float | None = None
        registry.register(self)

    def set(self, value: float | None) -> None:
        self._value = value

    def collect(self) -> Iterator[Metric]:
        if (value := self._value) is not None:
            yield GaugeMetricFamily(self._name, self._text, value=value)


class FastHistogram:
    """A histogram for one combination of label values. `counts` holds the observations per bucket, not cumulative."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class HistogramCollector:
    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, bounds: Sequence[float], labels: Sequence[str]
    ) -> None:
        self._name = f"profiles_{name}"
        self._text = text
        self._bounds = bounds
        self._labels = labels
        self._marks = [*map(floatToGoString, bounds), "+Inf"]
        self._histograms: dict[tuple[str, ...], FastHistogram] = {}
        registry.register(self)

    def labels(self, *values: object) -> FastHistogram:
        key = tuple(map(str, values))
        histogram = self._histograms.get(key)
        if histogram is None:
            if len(key) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {', '.join(self._labels)}, not {values}")
            histogram = self._histograms[key] = FastHistogram(self._bounds)
        return histogram

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for key, histogram in list(self._histograms.items()):
            buckets = list(zip(self._marks, map(float, accumulate(histogram.counts)), strict=True))
            family.add_metric(key, buckets, histogram.sum)
        yield family
