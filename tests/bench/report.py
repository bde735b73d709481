"""The findings: tables in the terminal, and a JSON file that a later run can be held against."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.stores.valkey.embedded import server_binary
from tests.bench.timing import Comparison, Curve, Result

WIDTH = 120
PACKAGES = ("litestar", "granian", "msgspec", "redis", "hiredis", "aiosqlite", "arq", "uvloop")


def written(results: Sequence[Result]) -> str:
    """Everything as JSON, with when, where and on what it was measured."""
    comparisons = [{**item._asdict(), "ratio": item.ratio} for item in results if isinstance(item, Comparison)]
    curves = [item._asdict() for item in results if isinstance(item, Curve)]
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
        "comparisons": comparisons,
        "curves": curves,
    }
    return json.dumps(found, indent=2) + "\n"


def ratios(file: Path) -> dict[tuple[str, str], float]:
    """The ratios of an earlier run, by what was compared with what."""
    return {(item["name"], item["against"]): item["ratio"] for item in json.loads(file.read_text())["comparisons"]}


def show(results: Sequence[Result], earlier: Mapping[tuple[str, str], float] | None = None) -> None:
    """Print what was compared, with the ratios of an earlier run where there are some; then a table for each sweep."""
    console = Console(width=WIDTH)
    table = Table("what", "against", title="per unit of work, medians; a ratio below 1: ours is better")
    headings = ["reference", "ours", "ratio", "at most"] + (["before"] if earlier else [])
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        if isinstance(result, Comparison):
            at_most, met = result.at_most, result.at_most is None or result.ratio <= result.at_most
            cells = [_figure(result.reference, result.unit), _figure(result.ours, result.unit), _ratio(result.ratio)]
            cells.append("" if at_most is None else f"{_ratio(at_most)} {'✓' if met else '✗'}")
            if earlier:
                before = earlier.get((result.name, result.against))
                cells.append("" if before is None else _ratio(before))
            table.add_row(result.name, result.against, *cells)
    console.print(table)
    for result in results:
        if isinstance(result, Curve):
            console.print(_sweep(result))


def _sweep(curve: Curve) -> Table:
    table = Table(title=f"{curve.name} ({'' if curve.y == 'seconds' else curve.y})".removesuffix(" ()"))
    for heading in (curve.x, *curve.series):
        table.add_column(heading, justify="right")
    for place, at in enumerate(curve.at):
        unit = "s" if curve.y == "seconds" else ""
        table.add_row(
            f"{at:,g}" if at < 1 else f"{at:,.0f}", *(_figure(line[place], unit) for line in curve.series.values())
        )
    return table


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e6:,.1f} µs" if value < 1e-3 else f"{value * 1e3:,.2f} ms"
    return f"{value:,.0f} {unit}".rstrip()


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
