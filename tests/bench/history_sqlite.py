"""Builds a training set in CSV by the standard library alone. The arguments are ROWS OUTPUT DATABASE PLAN.

PLAN is JSON: the statement, and the names and defaults of the features.
"""

import csv
import json
import sqlite3
import sys
from contextlib import closing
from datetime import datetime
from itertools import islice
from pathlib import Path

ROWS_AT_ONCE = 128


def main(rows: Path, output: Path, database: Path, plan: Path) -> None:
    """Add the features as of each row's time; keep its other columns."""
    statement, names, defaults = json.loads(plan.read_text())
    mask = (1 << len(names)) - 1
    with closing(sqlite3.connect(database)) as connection, rows.open() as source, output.open("w") as target:
        connection.execute("PRAGMA cache_size = -16384")
        reader, writer = csv.reader(source), csv.writer(target, lineterminator="\n")
        writer.writerow([*next(reader), *names])
        while piece := list(islice(reader, ROWS_AT_ONCE)):
            asked = [[row[0], mask, int(datetime.fromisoformat(row[1]).timestamp() * 1000), None] for row in piece]
            found = connection.execute(statement, {"clock_ms": 0, "asked": json.dumps(asked)}).fetchall()
            for row, (_, *values) in zip(piece, found, strict=True):
                known = zip(values, defaults, strict=True)
                writer.writerow([*row, *(default if value is None else value for value, default in known)])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
