"""`make torture`: minutes of faults under load, on real processes; prints the plan, the counts and every violation."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import uvloop

from tests.torture.books import Ledger
from tests.torture.faults import FAULTS
from tests.torture.mutants import MUTANTS
from tests.torture.plan import told
from tests.torture.run import Config, torture


def told_of(ledger: Ledger) -> str:
    """What happened, in figures."""
    lines = [f"{ledger.operations.total():,d} operations"]
    lines += [f"  {count:9,d}  {name}" for name, count in ledger.operations.most_common()]
    lines += [f"{ledger.answers:,d} profiles answered, of {ledger.users:,d} users, judged as "]
    lines += [f"  {ledger.observations:,d} different observations in {ledger.states:,d} states"]
    lines += ["answers by status"]
    lines += [f"  {count:9,d}  {name}" for name, count in sorted(ledger.statuses.items())]
    lines += [f"  {count:9,d}  {name}, no answer" for name, count in sorted(ledger.unanswered.items())]
    lines += [f"{ledger.faults.total():,d} faults"]
    lines += [
        f"  {ledger.faults[name]:6d}  {name}" + (f"  ({ledger.missed[name]} missed)" if ledger.missed[name] else "")
        for name in FAULTS
    ]
    lines += ["of the API processes that live at the end"]
    lines += [f"  {count:9,d}  {name}" for name, count in ledger.metrics.items()]
    lines += [f"slowest answer {ledger.slowest_s:.1f} s", f"{ledger.undecided} users undecided"]
    lines += [f"{len(ledger.violations)} violations", *(f"\n{text}" for text in ledger.violations[:20])]
    return "\n".join(lines)


def main() -> int:
    """Parse, run, tell; 1 where a promise was broken or the checker could not decide."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--operations", type=int, default=0, help="stop earlier, after so many")
    parser.add_argument("--rate", type=float, default=1.0, help="faults a second")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which of them, by name")
    parser.add_argument("--hesitate", default="0.02:0.02", help="probability:seconds between steps of the protocol")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--apis", type=int, default=2)
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="build a fault into the service")
    parser.add_argument("--disk", type=Path, help="an empty small file system for the database, to be filled up")
    parser.add_argument("--plan", action="store_true", help="print the plan of faults and end")
    chosen = parser.parse_args()
    config = Config(
        seed=chosen.seed,
        seconds=chosen.minutes * 60,
        clients=chosen.clients,
        users=chosen.users,
        apis=chosen.apis,
        rate_per_s=chosen.rate,
        hesitate=chosen.hesitate,
        faults=[name for name in chosen.faults.split(",") if name],
        mutant=chosen.mutant,
        stop_at_first=chosen.mutant is not None,
        disk=chosen.disk,
        operations=chosen.operations,
    )
    print(f"{config}\n{told(config.plan())}", flush=True)
    if chosen.plan:
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running
    ledger = Ledger()
    try:
        uvloop.run(torture(config, lambda text: print(text, flush=True), ledger))
    finally:
        print(told_of(ledger))
    return 1 if ledger.violations or ledger.undecided else 0


if __name__ == "__main__":
    sys.exit(main())
