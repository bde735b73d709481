"""The names of the metrics that a process exports."""

from app.telemetry import Metrics
from app.telemetry.counters import OptionalGauge


def metric_names() -> set[str]:
    """As Prometheus stores them, without the endings of histograms."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        if isinstance(metric, OptionalGauge):
            metric.set(0)
    endings = {"counter": "_total", "info": "_info"}
    return {family.name + endings.get(family.type, "") for family in metrics.collectors.collect()}
