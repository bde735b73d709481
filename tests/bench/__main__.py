"""`make bench`: what is measured beside references in the same run, as tables, JSON and plots.

Each measurement runs on servers of its own in a temporary directory, which are gone at its end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from app.telemetry import configure_logging
from tests.bench import (
    cold,
    growth,
    history,
    hit_ratio,
    hostile,
    ingest,
    overload,
    queue_lag,
    rebuild,
    scoring,
    start,
    statements,
    warm,
    while_measuring,
    while_rebuilding,
)
from tests.bench.ground import Ground, ground, prepared
from tests.bench.plots import draw
from tests.bench.report import ratios, show, written
from tests.bench.timing import Curve, Result

OUTPUT = Path("var/bench")
MEASUREMENTS: dict[str, Callable[[Ground], Iterator[Result]]] = {
    "concurrency": warm.concurrency,
    "batch": warm.batch,
    "hits": hit_ratio.measure,
    "cold": cold.measure,
    "keys": growth.keys,
    "size": growth.size,
    "rebuild": rebuild.measure,
    "history": history.measure,
    "reads-while-rebuilding": while_rebuilding.measure,
    "reads-while-measuring": while_measuring.measure,
    "ingest": ingest.measure,
    "overload": overload.measure,
    "hostile": hostile.measure,
    "lag": queue_lag.measure,
    "statements": statements.measure,
    "scoring": scoring.measure,
    "start": start.measure,
}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="make bench", description="Ratios against references in the same run.")
    parser.add_argument("--only", action="append", choices=list(MEASUREMENTS), help="one measurement; may be repeated")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"where the JSON and the plots go ({OUTPUT})")
    parser.add_argument("--against", type=Path, help="the JSON of an earlier run, whose ratios are shown beside")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk makes the load, and is missing (Debian: apt-get install wrk).")
    earlier = ratios(arguments.against) if arguments.against else None
    configure_logging("console", "error")
    results: list[Result] = []
    with prepared() as template:
        for name in arguments.only or MEASUREMENTS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            with ground(template) as place:
                results += MEASUREMENTS[name](place)
    show(results, earlier)
    drawn = draw([result for result in results if isinstance(result, Curve)], arguments.output)
    figures = arguments.output / "results.json"
    figures.write_text(written(results))
    print(f"{figures} and {len(drawn)} plots beside it")


if __name__ == "__main__":
    main()
