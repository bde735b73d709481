"""`profiles history` of a million rows, against the same SQL by plain sqlite3: time, and memory, which must not grow.

Both are processes of their own, which read and write CSV.
"""

from __future__ import annotations

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
from app.stores.sqlite.profile_statement import build
from tests.bench.ground import DAYS, Ground
from tests.bench.processes import told_of
from tests.bench.timing import Comparison, Curve, Result
from tests.support.registry import REGISTRY

COUNTS = (10_000, 100_000, 1_000_000)
AGAINST = "the same SQL, sqlite3"

# A process's peak counts from its fork on, so it is started by one that is smaller than this.
_LAUNCHER = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", *sys.argv[1:]])
_, status, used = os.wait4(pid, 0)
print(used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    peak_bytes: int


def measure(ground: Ground) -> Iterator[Result]:
    """Seconds a row and peak memory of the longest; rows a second and memory over the rows."""
    runs = [_runs(ground, count) for count in COUNTS]
    count, (reference, ours) = COUNTS[-1], runs[-1]
    name = f"history of {count:,} rows"
    yield Comparison(f"{name}, per row", AGAINST, reference.seconds / count, ours.seconds / count, 2.5)
    yield Comparison(f"{name}, peak memory", AGAINST, reference.peak_bytes, ours.peak_bytes, 5.0, "B")
    yield Comparison(f"{name}, peak memory", f"of {COUNTS[0]:,} rows", runs[0][1].peak_bytes, ours.peak_bytes, 1.1, "B")
    speed = {
        who: [count / pair[place].seconds for count, pair in zip(COUNTS, runs, strict=True)]
        for place, who in enumerate((AGAINST, "profiles"))
    }
    yield Curve("history", "rows", "rows per second", COUNTS, speed)


def _runs(ground: Ground, count: int) -> tuple[Run, Run]:
    """The reference and ours, which must find the same."""
    directory = ground.settings.database.parent
    rows, theirs, ours = (directory / name for name in ("rows.csv", "theirs.csv", "ours.csv"))
    _write_rows(rows, count, ground)
    plan = directory / "plan.json"
    plan.write_text(json.dumps([build(REGISTRY), REGISTRY.names, [entry.default for entry in REGISTRY]]))
    reference = _run(
        ground, "tests.bench.history_sqlite", str(rows), str(theirs), str(ground.settings.database), str(plan)
    )
    run = _run(ground, "app", "history", str(rows), "--output", str(ours))
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


def _write_rows(path: Path, count: int, ground: Ground) -> None:
    random = Random(count)
    with path.open("w") as file:
        file.write("user_id,as_of,label\n")
        for _ in range(count):
            at_ms = ground.now_ms - random.randrange(DAYS * DAY_MS)
            file.write(f"{random.choice(ground.users)},{rfc3339(at_ms)},{random.randrange(2)}\n")


def _run(ground: Ground, *command: str) -> Run:
    began = perf_counter()
    environment = {**os.environ, **told_of(ground.settings)}
    launched = subprocess.run(
        [sys.executable, "-c", _LAUNCHER, *command], env=environment, capture_output=True, text=True, check=True
    )
    return Run(perf_counter() - began, int(launched.stdout) * (1024 if sys.platform == "linux" else 1))
