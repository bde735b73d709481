"""`make fuzz`: generated requests under every key and without one, then coverage-guided input for the decoders.

The exit code is 1 if anything was found. The findings are printed, with the command that reproduces each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.guided import fuzz
from tests.fuzz.openapi import CALLERS, check
from tests.fuzz.service import running_service
from tests.fuzz.targets import TARGETS
from tests.support.live import KEYS


def fuzz_requests(callers: Sequence[str], examples: int, seed: int) -> list[str]:
    """Check the OpenAPI document as each caller, on a service of its own; the findings."""
    cases = 0
    found: list[str] = []
    for caller in callers:
        with running_service() as service:
            report = check(service.url, KEYS.get(caller), examples=examples, seed=seed, ids=service.ids)
            defects = service.log().count("unexpected_error") + service.log().count("fast_path_failed")
        cases += report.cases
        found += [f"{caller}: {finding}" for finding in report.findings]
        if defects:
            found.append(f"{caller}: {defects} defects in the log")
        if report.findings:
            print(report.output)
        print(f"{caller}: {report.cases:,} requests, {len(report.findings)} findings", flush=True)
    print(f"{cases:,} requests in all", flush=True)
    return found


def fuzz_targets(atheris: Path, seconds: int, seed: int, *, keep: bool) -> list[str]:
    """Fuzz every target; the findings."""
    inputs = 0
    found: list[str] = []
    for target in TARGETS:
        result = fuzz(target, atheris, seconds, seed, keep=keep)
        inputs += result.inputs
        if result.finding is not None:
            found.append(f"{target}: {result.finding}")
        print(f"{target}: {result.inputs:,} inputs, {'a finding' if result.finding else 'no finding'}", flush=True)
    print(f"{inputs:,} inputs in all", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description="Looks for faults with generated input.")
    parser.add_argument("atheris", type=Path, help="the directory where atheris is installed")
    parser.add_argument("--examples", type=int, default=100, help="requests for each operation and caller (100)")
    parser.add_argument("--seconds", type=int, default=60, help="time for each target (60); 0: no targets")
    parser.add_argument("--seed", type=int, default=1, help="another seed generates other input (1)")
    parser.add_argument(
        "--caller", action="append", choices=(*CALLERS, "none"), help="only this caller; none: only targets"
    )
    parser.add_argument("--keep", action="store_true", help="add input that reached new code to tests/fuzz/corpus")
    arguments = parser.parse_args()
    callers = [caller for caller in arguments.caller or CALLERS if caller != "none"]
    found = fuzz_requests(callers, arguments.examples, arguments.seed)
    if arguments.seconds:
        found += fuzz_targets(arguments.atheris.resolve(), arguments.seconds, arguments.seed, keep=arguments.keep)
    print("\n".join(found) or "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
