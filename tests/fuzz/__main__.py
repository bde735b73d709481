"""`make fuzz`: thousands of questions under every key and none, then input that is led by the code it reaches.

The exit code is 1 where anything was found; what, and how to ask it again, is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.contract import CALLERS, ask
from tests.fuzz.coverage import drive
from tests.fuzz.ground import ground
from tests.fuzz.targets import TARGETS
from tests.support.live import KEYS


def questions(callers: Sequence[str], examples: int, seed: int) -> list[str]:
    """Ask a service of its own for each caller; what was found."""
    asked = 0
    found: list[str] = []
    for caller in callers:
        with ground() as site:
            told = ask(site.url, KEYS.get(caller), examples=examples, seed=seed, ids=site.ids)
            defects = site.log().count("unexpected_error") + site.log().count("fast_path_failed")
        asked += told.cases
        found += [f"{caller}: {finding}" for finding in told.findings]
        if defects:
            found.append(f"{caller}: {defects} defects in the log")
        if told.findings:
            print(told.output)
        print(f"{caller}: {told.cases:,} questions, {len(told.findings)} findings", flush=True)
    print(f"{asked:,} questions in all", flush=True)
    return found


def inputs(atheris: Path, seconds: int, seed: int, *, keep: bool) -> list[str]:
    """Drive every target; what was found."""
    given = 0
    found: list[str] = []
    for target in TARGETS:
        driven = drive(target, atheris, seconds, seed, keep=keep)
        given += driven.inputs
        if driven.finding is not None:
            found.append(f"{target}: {driven.finding}")
        print(f"{target}: {driven.inputs:,} inputs, {'a finding' if driven.finding else 'no finding'}", flush=True)
    print(f"{given:,} inputs in all", flush=True)
    return found


def main() -> int:
    """Ask, drive, and say what was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Looks for faults with input of all kinds.")
    parser.add_argument("atheris", type=Path, help="where atheris is installed")
    parser.add_argument("--examples", type=int, default=100, help="questions for each operation and caller (100)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60); 0: none")
    parser.add_argument("--seed", type=int, default=1, help="another one asks other questions (1)")
    parser.add_argument("--caller", action="append", choices=(*CALLERS, "none"), help="only this one, or none at all")
    parser.add_argument("--keep", action="store_true", help="add what reached new code to tests/fuzz/corpus")
    arguments = parser.parse_args()
    callers = [caller for caller in arguments.caller or CALLERS if caller != "none"]
    found = questions(callers, arguments.examples, arguments.seed)
    if arguments.seconds:
        found += inputs(arguments.atheris.resolve(), arguments.seconds, arguments.seed, keep=arguments.keep)
    print("\n".join(found) or "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
