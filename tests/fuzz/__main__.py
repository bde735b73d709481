"""`make fuzz`: thousands of questions, under every key and none, and minutes of coverage-guided input.

The exit code is 1 where anything was found; what, and how to ask it again, is printed.
"""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.contract import CALLERS, ask
from tests.fuzz.ground import ground
from tests.support.live import KEYS


def main() -> int:
    """Ask, and say what was found."""
    parser = argparse.ArgumentParser(prog="make fuzz", description="Looks for faults with input of all kinds.")
    parser.add_argument("--examples", type=int, default=150, help="questions for each operation and caller (150)")
    parser.add_argument("--seed", type=int, default=1, help="another one asks other questions (1)")
    parser.add_argument("--caller", action="append", choices=CALLERS, help="only this one; may be repeated")
    arguments = parser.parse_args()
    asked = 0
    found: list[str] = []
    for caller in arguments.caller or CALLERS:
        with ground() as site:
            told = ask(site.url, KEYS.get(caller), examples=arguments.examples, seed=arguments.seed, ids=site.ids)
            defects = site.log().count("unexpected_error")
        asked += told.cases
        found += [f"{caller}: {finding}" for finding in told.findings]
        if defects:
            found.append(f"{caller}: {defects} defects in the log")
        if told.findings:
            print(told.output)
        print(f"{caller}: {told.cases} questions, {len(told.findings)} findings", flush=True)
    print(f"{asked} questions in all")
    print("\n".join(found) or "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
