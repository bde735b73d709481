"""`profiles history` of a million rows, against the same SQL by plain sqlite3: time and peak memory.

Both are processes of their own that read and write CSV.
"""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from time import perf_counter
from typing import NamedTuple

from app.features.clock import DAY_MS, rfc3339
from app.stores.sql.profile_statement import build
from app.stores.sqlite.features import DIALECT
from tests.bench.comparison import Comparison
from tests.bench.environment import DAYS, Environment
from tests.bench.servers import process_environment
from tests.support.registry import REGISTRY

FEW, MANY = 10_000, 1_000_000
AGAINST = "the same SQL, sqlite3"

# A process inherits the peak of the process that forks it, so a small one starts it.
_LAUNCHER = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", *sys.argv[1:]])
_, status, used = os.wait4(pid, 0)
print(used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Run(NamedTuple):
    seconds: float
    peak_bytes: int


def measure(environment: Environment) -> Iterator[Comparison]:
    (_, few), (reference, ours) = _runs(environment, FEW), _runs(environment, MANY)
    name = f"history of {MANY:,} rows"
    yield Comparison(f"{name}, per row", AGAINST, reference.seconds / MANY, ours.seconds / MANY, 2.5)
    yield Comparison(f"{name}, peak memory", AGAINST, reference.peak_bytes, ours.peak_bytes, 5.0, "B")
    yield Comparison(f"{name}, peak memory", f"of {FEW:,} rows", few.peak_bytes, ours.peak_bytes, 1.1, "B")


def _runs(environment: Environment, count: int) -> tuple[Run, Run]:
    """The reference and ours; raises `AssertionError` if their files differ."""
    directory = environment.settings.require_file().parent
    rows, theirs, ours = (directory / name for name in ("rows.csv", "theirs.csv", "ours.csv"))
    _write_rows(rows, count, environment)
    plan = directory / "plan.json"
    plan.write_text(json.dumps([build(REGISTRY, DIALECT).past, REGISTRY.names, [entry.default for entry in REGISTRY]]))
    reference = _run(
        environment,
        *("tests.bench.history_sqlite", str(rows), str(theirs), str(environment.settings.require_file()), str(plan)),
    )
    run = _run(environment, "app", "history", str(rows), "--output", str(ours))
    with theirs.open() as one, ours.open() as other:
        for number, (line, found) in enumerate(zip(csv.reader(one), csv.reader(other), strict=True)):
            if line[:3] != found[:3] or (
                number and [_value(cell) for cell in line] != [_value(cell) for cell in found]
            ):
                raise AssertionError(f"line {number + 1}: {found} here, {line} by sqlite3")
    return reference, run


def _value(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _write_rows(path: Path, count: int, environment: Environment) -> None:
    random = Random(count)
    with path.open("w") as file:
        file.write("user_id,as_of,label\n")
        for _ in range(count):
            at_ms = environment.now_ms - random.randrange(DAYS * DAY_MS)
            file.write(f"{random.choice(environment.users)},{rfc3339(at_ms)},{random.randrange(2)}\n")


def _run(environment: Environment, *command: str) -> Run:
    began = perf_counter()
    variables = {**os.environ, **process_environment(environment.settings)}
    launched = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *command], env=variables, capture_output=True, text=True, check=True
    )
    return Run(perf_counter() - began, int(launched.stdout) * (1024 if sys.platform == "linux" else 1))
