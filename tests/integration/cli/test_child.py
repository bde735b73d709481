"""A child of `profiles up`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.cli.child import Child
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
