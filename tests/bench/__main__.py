"""`make bench`: measures the service and references in alternating rounds, and prints the ratios.

Each measurement has servers of its own in a temporary directory.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from app.telemetry import configure_logging
from tests.bench import (
    busy_reads,
    clients,
    cluster,
    cold,
    expiry,
    history,
    hits,
    hostile,
    ingest,
    keys,
    lag,
    overload,
    postgres,
    rebuild,
    scoring,
    start,
    statements,
    warm,
)
from tests.bench.comparison import Comparison, earlier_ratios, show, to_json
from tests.bench.environment import Environment, demonstration_set, environment

OUTPUT = Path("var/bench")
MEASUREMENTS: dict[str, Callable[[Environment], Iterator[Comparison]]] = {
    "concurrency": warm.concurrency,
    "batch": warm.batch,
    "hits": hits.measure,
    "expiry": expiry.measure,
    "cold": cold.measure,
    "keys": keys.measure,
    "rebuild": rebuild.measure,
    "history": history.measure,
    "reads-while-rebuilding": busy_reads.while_rebuilding,
    "reads-while-measuring": busy_reads.while_measuring,
    "ingest": ingest.measure,
    "postgres": postgres.measure,
    "overload": overload.measure,
    "hostile": hostile.measure,
    "lag": lag.measure,
    "statements": statements.measure,
    "cluster": cluster.measure,
    "scoring": scoring.measure,
    "clients": clients.measure,
    "start": start.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description="Ratios against references in the same run.")
    parser.add_argument("--only", action="append", choices=list(MEASUREMENTS), help="one measurement; may be repeated")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"the directory of results.json ({OUTPUT})")
    parser.add_argument("--against", type=Path, help="the results.json of an earlier run; its ratios are shown, too")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is missing; the benchmarks need it to generate load (Debian: apt-get install wrk).")
    earlier = earlier_ratios(arguments.against) if arguments.against else None
    configure_logging("console", "error")
    results: list[Comparison] = []
    with demonstration_set() as template:
        for name in arguments.only or MEASUREMENTS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            with environment(template) as place:
                results += MEASUREMENTS[name](place)
    show(results, earlier)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.json"
    file.write_text(to_json(results))
    print(file)


if __name__ == "__main__":
    main()
