"""The result of a measurement: a ratio against a reference, in a table and in a JSON file for later comparisons."""

import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from app.stores.valkey.embedded import server_binary

ROUNDS = 7
WIDTH = 120
PACKAGES = ("litestar", "granian", "msgspec", "redis", "hiredis", "aiosqlite", "arq", "uvloop")

Work = Callable[[], Awaitable[object]]


class Comparison(NamedTuple):
    """Two medians for the same unit of work, in seconds or bytes, or two shares. `at_most` is the limit for their
    ratio, if any."""

    name: str
    against: str
    reference: float
    ours: float
    at_most: float | None = None
    unit: Literal["s", "B", ""] = "s"

    @property
    def ratio(self) -> float:
        """Ours divided by the reference; below 1, ours is better."""
        return self.ours / self.reference


async def compare(
    name: str,
    against: str,
    reference: Work,
    ours: Work,
    *,
    repeat: int,
    units: int = 1,
    at_most: float | None = None,
    rounds: int = ROUNDS,
) -> Comparison:
    """Run both in alternating rounds of `repeat` calls. One call does `units` units of work."""
    await reference()
    await ours()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, taken in zip((reference, ours), times, strict=True):
            started = perf_counter()
            for _ in range(repeat):
                await work()
            taken.append((perf_counter() - started) / repeat / units)
    return Comparison(name, against, median(times[0]), median(times[1]), at_most)


def show(results: Sequence[Comparison], earlier: Mapping[tuple[str, str], float] | None = None) -> None:
    """Print a table, with the ratios of an earlier run if there is one."""
    table = Table("what", "against", title="per unit of work, medians; a ratio below 1: ours is better")
    for heading in ["reference", "ours", "ratio", "at most"] + (["before"] if earlier else []):
        table.add_column(heading, justify="right")
    for result in results:
        cells = [_figure(result.reference, result.unit), _figure(result.ours, result.unit), _ratio(result.ratio)]
        met = result.at_most is None or result.ratio <= result.at_most
        cells.append("" if result.at_most is None else f"{_ratio(result.at_most)} {'✓' if met else '✗'}")
        if earlier:
            before = earlier.get((result.name, result.against))
            cells.append("" if before is None else _ratio(before))
        table.add_row(result.name, result.against, *cells)
    Console(width=WIDTH).print(table)


def to_json(results: Sequence[Comparison]) -> str:
    """The results, with the date, the machine and the versions."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "server": _output([server_binary(), "--version"]),
            "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
            **{package: version(package) for package in PACKAGES},
        },
        "comparisons": [{**item._asdict(), "ratio": item.ratio} for item in results],
    }
    return json.dumps(found, indent=2) + "\n"


def earlier_ratios(file: Path) -> dict[tuple[str, str], float]:
    """The ratios of an earlier run, by name and reference."""
    return {(item["name"], item["against"]): item["ratio"] for item in json.loads(file.read_text())["comparisons"]}


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:,.1f} µs" if value < 1e-3 else f"{value * 1e3:,.2f} ms"
    return f"{value:,.0f} {unit}" if unit else f"{value:.2%}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
