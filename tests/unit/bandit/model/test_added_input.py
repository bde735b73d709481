"""An input is one entry of `definitions.py`: shown by a program that has the README's, on a database of this one."""

from pathlib import Path

import pytest

from app.bandit.model.definitions import __file__ as definitions
from app.bandit.model.inputs import NEWEST, SPECS
from app.bandit.rollout.stages import Target
from app.stores.sqlite.database import SqliteDatabase
from tests.support.bandit_process import BanditProcess
from tests.support.clock import NOW_MS
from tests.support.processes import ROOT
from tests.support.program_copy import copied_program, found_by
from tests.support.readme import sections

END = "\n)\nCANDIDATE_FEATURES"


def add_input(tree: Path) -> None:
    """Add the README's entry to a copy of the program."""
    entry = sections()["app/bandit/README.md: Adding an input"][0].code
    path = tree / Path(definitions).relative_to(ROOT)
    source = path.read_text()
    assert source.count(END) == 1
    path.write_text(source.replace(END, f"\n{entry.strip()},{END}"))


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the program with one more input, beside the tests."""
    tree = copied_program(tmp_path)
    add_input(tree)
    return tree


@pytest.mark.slow
async def test_added_input_is_one_entry(extended: Path, database_path: Path) -> None:
    database = await SqliteDatabase.open(database_path, readers=1)
    process = BanditProcess(database)
    for number in range(20):
        if number == 10:
            await process.pool()
        decision = await process.decide("ann" if number % 3 else "bob")
        await process.feed_back(decision, "dismissed" if number % 2 else "completed")
    repository = process.bandit.rollout.repository
    assert await repository.move(await repository.state(), Target("ramp", 0.5), "good", "ann", NOW_MS) is not None
    await process.close()
    await database.close()

    found = found_by("tests.unit.bandit.model.added_input", extended, database_path, process.clock.now_ms() + 1000)
    assert {version: found["specs"][str(version)] for version in (1, 2)} == {
        spec.version: spec.hash for spec in SPECS.values()
    }
    assert (found["challenger"], found["evaluated"]) == ("lints-v3", 3)
    assert found["names"] == [*NEWEST.names, "effort", "completion_x_effort", "weekend_x_effort"]
    assert found["schema"]["properties"]["effort_minutes"]["anyOf"] == [
        {"type": "number", "minimum": 0},
        {"type": "null"},
    ]
    assert found["schema"]["required"] == ["is_overdue", "task_age_days", "priority"]
    # The default adds nothing to a decision that was made before the input existed.
    assert found["old"]["count"] == 20
    assert found["old"]["champion_differs"] == 0
    assert found["old"]["challenger_differs"] < 0.02  # a draw may win by a rounding error
    assert found["grown"] == [25, 28, True]
    assert found["pooled"]
    assert found["efforts"] == [5.0, 480.0, None]
    assert found["weekend"] is True
    assert found["record"] == {"at": None, "weekend": True}
    assert found["weekend_x_effort"] == found["effort"]
    short, long, unknown = found["effort"]
    assert 0 == unknown < short < long == 1
    short, long, unknown = found["scores"]
    assert short > long
    assert found["without_shadow"] == 0

    # The stage at which the other challenger served half of the users is not that of this one.
    assert found["roles"] == ["champion"]
    assert found["stage"] == ["rolled back", "shadow", 0.0]

    # The program without the input is put back: it can read what it does not know.
    database = await SqliteDatabase.open(database_path, readers=1)
    process = BanditProcess(database)
    assert (await process.bandit.rollout.state()).stage == "rolled back"
    (decision_id,) = (await process.rows("SELECT decision_id FROM tip_scores WHERE user_id = 'new'"))[0]
    shown, _ = await process.bandit.scorer.explain(decision_id)
    assert [item.id for item in shown.candidates] == ["short", "long", "unknown"]
    await process.close()
    await database.close()
