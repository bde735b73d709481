"""The README's commands about an added input, in a copy of the program that has it."""

import shutil
from pathlib import Path

import pytest

from profiles_client import Candidate, Profiles
from tests.support.processes import ROOT
from tests.support.readme import Reader, sections
from tests.unit.bandit.model.test_added_input import add_input


@pytest.mark.slow
def test_commands_about_an_added_input_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    add_input(tmp_path)
    (tmp_path / "reader").mkdir()
    reader = Reader(tmp_path / "reader")
    reader.environment |= {"PYTHONPATH": str(tmp_path), "PROFILES_SHADOW": "1"}
    _, commands = sections()["app/bandit/README.md: Adding an input"]
    with reader.up():
        printed = reader.follow([commands])
        with Profiles(f"http://127.0.0.1:{reader.port}", deadline_s=10) as profiles:
            tips = [Candidate("t-1", True, 3.5, 2, {"effort_minutes": 15})]
            decision = profiles.decide("user-0001", tips, context={"weekend": True})
        explained = reader.get(f"/decisions/{decision.id}")
        contexts = [record["context"] for record in reader.get("/decisions")["decisions"]]
    assert '"decision_id"' in printed
    assert "\neffort_minutes\n" in printed
    assert "lints-v3" in printed
    assert explained["context"] == {"at": None, "weekend": True}
    assert contexts == [explained["context"]] * 2
    (candidate,) = explained["candidates"]
    assert candidate["features"] == {"is_overdue": True, "task_age_days": 3.5, "priority": 2, "effort_minutes": 15}
