"""Checks the service against its OpenAPI document: requests that schemathesis generates, with the key of one caller.

A finding is an answer that the document does not describe: a 5xx, an undocumented status or header, a body of another
shape, valid input rejected, invalid input accepted, or a method or key that is not checked.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.support.processes import ROOT

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
TIMEOUT_S = 3_600
IDS_VARIABLE = "FUZZ_IDS"
LETTERS = 200
RUNS = 20
CALLERS = ("anonymous", "reader", "writer", "admin")
INSERT_LETTER = """
INSERT INTO dead_letters (source, payload, error, traceback, attempts, created_at_ms, last_failed_at_ms)
VALUES ('queue', ?, 'no event', '', 1, 0, 0)
"""
INSERT_RUN = """
INSERT INTO rebuilds
    (id, scope, features, state, done, total, requested_by, created_at_ms, started_at_ms, touched_at_ms, finished_at_ms)
VALUES (?, 'all', '[]', 'completed', 1, 1, 'admin', 0, 0, 0, 1)
"""
INSERT_DECISION = """
INSERT INTO tip_scores (decision_id, user_id, created_at_ms, explore, role, served_by, policy_hash, spec_hash,
    state_version, prior_version, profile_origin, profile_present, chosen, chosen_id, elapsed_us, theta, phi,
    champion_scores, champion_pi, request)
VALUES ('decision-1', 'ada', 1, 1, 'champion', 'lints-v1', 'of another release', 'of another release', 0, 0, 'absent',
    0, 0, 'tip', 1, zeroblob(8), zeroblob(8), zeroblob(8), zeroblob(8),
    '{"candidates":[{"id":"tip","features":{"is_overdue":true,"task_age_days":1,"priority":0}}],"at":null,"profile":null}')
"""
ALL_PHASES = ("examples", "coverage", "fuzzing", "stateful")

Mode = Literal["positive", "all"]


class Report(NamedTuple):
    """The number of requests, one line for each finding, and the output of schemathesis."""

    cases: int
    findings: list[str]
    output: str


def check(
    url: str,
    key: str | None,
    *,
    phases: Sequence[str] = ALL_PHASES,
    mode: Mode = "all",
    examples: int = 1,
    seed: int = 1,
    ids: Mapping[str, Sequence[Any]] | None = None,
) -> Report:
    """Send requests for every operation, with a key or without one.

    In mode `positive` all input is valid. `examples` is the number of requests for each operation in the fuzzing phase.
    `ids` are ids that exist, by the name of the path parameter.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        report = Path(directory) / "report.json"
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("--config-file", str(CONFIGURATION), "run", f"{url}/schema/openapi.json", "--no-color"),
            *("--phases", ",".join(phases), "--mode", mode, "--max-examples", str(examples), "--seed", str(seed)),
            *("--report", "json", "--report-json-path", str(report)),
            *(("--header", f"X-API-Key: {key}") if key is not None else ()),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), IDS_VARIABLE: json.dumps(ids or {})}
        done = subprocess.run(
            command, env=environment, cwd=directory, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        output = done.stdout + done.stderr
        if not report.exists():
            return Report(0, [f"schemathesis ended with {done.returncode}"], output)
        report_json = json.loads(report.read_text())
    findings = [f"{item['title']}: {', '.join(item['operations'])}" for item in report_json["failures"]]
    findings += [f"not requested: {item}" for item in report_json["errors"]]
    if not report_json["complete"] or report_json["operations"]["tested"] != report_json["operations"]["total"]:
        findings.append(f"not all operations were tested: {report_json['operations']}")
    return Report(report_json["test_cases"]["generated"], findings, output)


def populate(database: Path) -> dict[str, list[Any]]:
    """Add rows that paths can name to a migrated database; their ids by the name of the path parameter."""
    runs = [f"run-{number}" for number in range(RUNS)]
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executemany(INSERT_LETTER, [(json.dumps({"user_id": f"u-{number}"}),) for number in range(LETTERS)])
        connection.executemany(INSERT_RUN, [(run,) for run in runs])
        connection.execute(INSERT_DECISION)
        letters = [row[0] for row in connection.execute("SELECT id FROM dead_letters")]
    return {"run_id": runs, "letter_id": letters, "user_id": ["ada", "grace"], "decision_id": ["decision-1"]}
