"""A child of `profiles up`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from app.cli.child import Child, replace_one_by_one
from tests.support.waiting import eventually_sync


@pytest.mark.slow
def test_child_is_this_program_when_the_directory_shadows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "app").mkdir()
    for name in ("__init__.py", "__main__.py"):
        (tmp_path / "app" / name).write_text("raise SystemExit(77)")
    monkeypatch.chdir(tmp_path)
    child = Child("worker", {**os.environ, "PROFILES_LOG_LEVEL": "nonsense"})
    child.start()
    codes: list[int | None] = []

    def ended() -> bool:
        codes.append(child.check())
        return codes[-1] is not None

    eventually_sync(ended)
    assert codes[-1] == 2  # ours refuses the setting
    child.stop()


def test_child_is_started_later_when_it_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = Child("worker", dict(os.environ))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        assert child.check() is None
        assert not child.running()
    assert "worker cannot be started: " in capsys.readouterr().err
    eventually_sync(lambda: (child.check(), child.running())[1])
    child.stop()


READY_ONCE = """
import os, pathlib, sys
if pathlib.Path(__file__ + ".ran").exists(): sys.exit(2)
pathlib.Path(__file__ + ".ran").touch()
sys.exit(os.write(int(sys.argv[-1].partition("=")[2]), b"."))
"""


@pytest.mark.slow
def test_child_is_restarted_when_only_an_earlier_process_was_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}{READY_ONCE}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    child = Child("worker", dict(os.environ))
    eventually_sync(lambda: (child.check(), "exit code 2" in capsys.readouterr().err) == (None, True))
    child.stop()


def test_processes_stay_when_no_new_one_can_be_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = Child("worker", dict(os.environ))
    child.start()
    children = [child]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nowhere/python")
        assert next(replace_one_by_one(children), "ended") == "ended"
    assert (children, child.running()) == ([child], True)
    assert "the old processes go on" in capsys.readouterr().err
    child.stop()
