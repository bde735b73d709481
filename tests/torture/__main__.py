"""`make torture`: a run on real processes. Prints the counts and every violation.

Mode `faults`: faults at random moments, and every answer checked. Mode `durability`: API processes are killed during
ingest. Mode `relay`: each event is sent to one process, and read from another at once. Mode `soak`: the memory of the
processes under a steady load.
"""

import argparse
import signal
import sys
from pathlib import Path

import uvloop

from tests.torture.config import MODES, Config
from tests.torture.mutants import MUTANTS
from tests.torture.network import isolate, obstacle
from tests.torture.plan import listing
from tests.torture.records import RunRecord
from tests.torture.run import torture


def main() -> int:
    """The exit code is 1 if a promise was broken or the checker could not decide."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--mode", choices=sorted(MODES), default="faults", help="the preset of the other options")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--operations", type=int, help="stop earlier, after so many operations")
    parser.add_argument("--kills", type=int, help="stop earlier, after so many kills of an API process")
    parser.add_argument("--rate", type=float, dest="rate_per_s", help="faults per second")
    parser.add_argument("--faults", help="the faults by name, separated by commas")
    parser.add_argument("--hesitate", help="probability:seconds between steps of the protocol")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--users", type=int)
    parser.add_argument("--apis", type=int)
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="build a fault into the service")
    parser.add_argument("--disk", type=Path, help="an empty small file system for the database, which will be filled")
    parser.add_argument("--plan", action="store_true", help="print the plan of faults and exit")
    parser.add_argument("--postgres", action="store_true", help="several hosts, which share PostgreSQL")
    parser.add_argument("--cluster", action="store_true", help="with --postgres: the cache is a cluster")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    mode, only_plan = given.pop("mode"), given.pop("plan")
    if "minutes" in given:
        given["seconds"] = given.pop("minutes") * 60
    if "faults" in given:
        given["faults"] = tuple(filter(None, given["faults"].split(",")))
    config = Config(**{**MODES[mode], **given, "stop_at_first": "mutant" in given})
    if only_plan:
        print(listing(config.plan()))
        return 0
    if config.cluster and not config.postgres:
        parser.error("--cluster needs --postgres")
    if config.postgres:
        if (why := obstacle()) is not None:
            print(f"cannot run: {why}", file=sys.stderr)
            return 2
        isolate()
    print(config, flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes of the run are ended
    record = RunRecord()
    try:
        uvloop.run(torture(config, lambda text: print(text, flush=True), record))
    finally:
        print(record.summary())
    return 1 if record.violations or record.undecided else 0


if __name__ == "__main__":
    sys.exit(main())
