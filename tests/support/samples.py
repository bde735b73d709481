"""Builders of the samples that processes store about their operation."""

from collections.abc import Iterator
from typing import Any

import msgspec

from app.operations.component_states import COMPONENTS, OK
from app.operations.samples import Gauges, Sample
from tests.support.clock import NOW_MS


def sample(**changes: Any) -> Sample:
    """A sample of an API process over ten seconds, with fields replaced."""
    plain = Sample(at_ms=NOW_MS, process="one", role="api", seconds=10.0)
    return msgspec.structs.replace(plain, **changes)


def hour(now_ms: int, gap: range = range(0)) -> Iterator[Sample]:
    """Samples of two API processes and a worker over an hour. `gap` leaves some out, counted back from now."""
    for number in range(355, 0, -1):
        if number in gap:
            continue
        at_ms = now_ms - number * 10_000
        load = 400 + 5 * (number % 60)
        gauges = Gauges(queue_depth=number % 4, outbox=number % 7, outbox_age_s=0.4, dead_letters=0, owed=0)
        common = Sample(
            at_ms=at_ms,
            process="c0ffee42",
            role="worker",
            seconds=10.0,
            counts={"lag_0.005": 4, "lag_0.01": 1},
            gauges=gauges,
            components=dict.fromkeys(COMPONENTS, OK),
        )
        yield common
        for process in ("3f9a01bc", "77aa10ff"):
            counts = {"requests_2xx": load, "hits": 5 * load, "misses": 9, "fills_refused": number % 2}
            latency = {"latency_0.00025": load // 2, "latency_0.0005": load // 2, "latency_0.005": number % 9}
            counts |= common.counts | latency
            yield msgspec.structs.replace(common, process=process, role="api", counts=counts)
