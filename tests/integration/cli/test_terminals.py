"""The output of commands to a pipe, to an ASCII terminal, and to a program."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.cli.events import LINES_PER_REQUEST
from app.features.clock import rfc3339
from tests.integration.cli.conftest import Run
from tests.support.processes import environment_of, interruptible
from tests.support.traffic import now_ms
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.slow  # a process for each command
USER = "Zoë"


def run(
    arguments: Sequence[str | bytes], directory: Path, stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """`profiles …` as a process of its own, with a pipe for its output."""
    inherited = {name: value for name, value in environment_of().items() if not name.startswith(("LC_", "LANG"))}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=directory,
        env={**inherited, "COLUMNS": "80", **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [["features"], ["profile", "ann"], ["doctor"]], ids=lambda given: given[0])
def test_output_is_whole_in_a_pipe(migrated: Run, tmp_path: Path, arguments: list[str | bytes]) -> None:
    shown = run(arguments, tmp_path).stdout.decode()
    assert "…" not in shown
    if arguments == ["features"]:
        assert "Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1." in shown


@pytest.mark.parametrize(
    "arguments",
    [["features"], ["profile", "ann", "--json"], ["openapi"], ["history", "rows.csv"], ["events", "none"]],
    ids=lambda given: given[0],
)
def test_output_that_cannot_be_written_is_an_error(migrated: Run, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "rows.csv").write_text(f"user_id,as_of\nann,{rfc3339(now_ms())}\n")
    (tmp_path / "none").touch()
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("wb") as full, os.fdopen(writer, "wb") as unread:
        for output, code, message in ((full, 4, b"No space left on device"), (unread, 1, b"")):
            shown = run(arguments, tmp_path, stdout=output, PYTHONUNBUFFERED="")
            assert (shown.returncode, message in shown.stderr) == (code, True), shown.stderr
            assert shown.stderr.count(b"\n") == bool(message), shown.stderr


def test_closed_streams_are_empty(migrated: Run, tmp_path: Path) -> None:
    for command, code in (("profile ann", 0), ("events -", 0), ("history -", 5), ("profile a/b", 5)):
        closed = ["sh", "-c", f"exec '{sys.executable}' -m app {command} <&- >&- 2>&-"]
        assert subprocess.run(closed, cwd=tmp_path, env=environment_of(), check=False, timeout=60).returncode == code


def test_ctrl_c_ends_a_command_that_waits_for_input(migrated: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app", "events", "-", "--skip-bad"]
    with interruptible(
        command, cwd=tmp_path, env=environment_of(), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(b"bad\n" * LINES_PER_REQUEST)
        running.stdin.flush()
        for _ in range(LINES_PER_REQUEST):
            assert b"not valid JSON" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=PATIENCE_S) == 1
        assert running.stderr.read() == b"\nAborted!\n"


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["output", "locale"],
)
@pytest.mark.parametrize(
    "arguments",
    [["profile", USER], ["features"], ["rebuild", USER], ["rollout", "status"], ["doctor"], ["audit", USER]],
    ids=lambda given: given[0],
)
def test_no_command_fails_when_output_is_ascii(
    migrated: Run, tmp_path: Path, arguments: list[str], environment: dict[str, str]
) -> None:
    here = run([argument.encode() for argument in arguments], tmp_path, **environment)
    there = run([argument.encode() for argument in arguments], tmp_path, LC_ALL="C.UTF-8")
    assert here.returncode == there.returncode
    assert b"Traceback" not in here.stderr
    assert here.stdout.isascii()
    assert here.stderr.isascii()


def test_user_id_is_kept_when_the_locale_is_ascii(migrated: Run, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = run(["profile", USER.encode(), "--json"], tmp_path, **plain)
    assert json.loads(shown.stdout)["user_id"] == USER
    refused = run(["profile", b"a\xff"], tmp_path, **plain)
    assert refused.returncode == 5
    assert b"user_id: " in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (["migrate"], {}),
        (["profile", "a/b"], {}),
        (["migrate"], {"PROFILES_PORT": "http"}),
        (["serve"], {}),
        (["events", "no-such-event.json"], {}),
        (["up"], {"PROFILES_HOST": "203.0.113.1"}),
    ],
)
def test_stderr_is_json_when_the_log_is_json(
    tmp_path: Path, arguments: list[str | bytes], settings: dict[str, str]
) -> None:
    (tmp_path / "no-such-event.json").write_text('{"subject": "none"}\n{}\n')
    shown = run(arguments, tmp_path, PROFILES_LOG_FORMAT="json", **settings)
    lines = [json.loads(line) for line in shown.stderr.splitlines()]
    assert lines
    assert all(line["event"] and line["level"] and line["timestamp"] for line in lines)
