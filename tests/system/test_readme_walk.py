"""The README's "Adding a feature", followed by a newcomer in an empty directory outside the repository."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.readme import UP, Reader, sections


@pytest.mark.slow
def test_own_feature_works_as_the_readme_says(tmp_path: Path) -> None:
    assert shutil.which("curl"), "the README's commands need curl"
    assert not tmp_path.is_relative_to(ROOT)
    file, start, change = sections()["README.md: Adding a feature"]
    reader = Reader(tmp_path)
    reader.follow([file])
    before, up, _ = start.code.partition(UP)
    assert up
    assert "snooze_rate: 1 " in reader.follow([start._replace(code=before)])
    with reader.up(before):
        printed = reader.follow([change])
        assert set(reader.get("/profiles/user-0001")["features"]) > {"snooze_rate", "tip_volume_30d"}

    (answer,) = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    feature = answer["features"]["snooze_rate"]
    assert 0 <= feature["value"] <= 1
    assert re.search("feature snooze_rate, change changed, details window: 7 days.* → 14 days.*, breaks no", printed)
    assert re.search("changed share +│", printed)
