"""The output of commands to a pipe, to an ASCII terminal, and to a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Run
from tests.support.registry import FEATURES

pytestmark = pytest.mark.slow  # a process for each command
USER = "Zoë"


def run(arguments: list[str | bytes], directory: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`profiles …` as a process of its own, with a pipe for its output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PROFILES_", "LC_", "LANG"))}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=directory,
        env={**inherited, "PROFILES_FEATURES": FEATURES, "COLUMNS": "80", **environment},
        capture_output=True,
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
