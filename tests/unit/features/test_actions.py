"""Adding an action is one line of `app/features/events.py`: shown by a program that has the README's."""

from pathlib import Path

import pytest

from app.features.events import Action
from app.stores.sql.users import SqlUsers
from app.stores.sqlite.database import SqliteDatabase
from tests.support.program_copy import copied_program, found_by
from tests.support.readme import sections
from tests.unit.features.fourth_action import NAME

LAST = '    SNOOZED = "snoozed", 0.3\n'
RESERVED = {"none", "served", "start", "end", "hour"}


def test_every_action_has_a_name_and_a_reward_that_fit() -> None:
    for action in Action:
        assert action.isidentifier()
        assert action not in RESERVED
        assert 0 <= action.reward <= 1


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the program with a fourth action, beside the tests."""
    tree = copied_program(tmp_path)
    declarations = tree / "app" / "features" / "events.py"
    source = declarations.read_text()
    assert source.count(LAST) == 1
    (line,) = sections()["app/bandit/README.md: Adding a feedback action"]
    declarations.write_text(source.replace(LAST, f"{LAST}    {line.code}"))
    return tree


@pytest.mark.slow
async def test_fourth_action_needs_one_line(extended: Path, database_path: Path) -> None:
    found = found_by(
        "tests.unit.features.fourth_action", extended, database_path
    )  # migrated by a program with three actions
    assert found["profile"]["completion_rate_30d"] == 0.0
    assert (found["outcome"]["action"], found["outcome"]["reward"]) == (NAME, 0.8)
    assert found["overridden"] == 0.75
    assert found["issue"]["path"] == "action"
    assert found["issue"]["detail"].endswith(f"allowed is completed, dismissed, snoozed or {NAME}")
    assert set(found["openapi"]["action"]) == {"completed", "dismissed", "snoozed", NAME}
    assert found["openapi"]["day"] == ["served", "completed", "dismissed", "snoozed", NAME, "start", "end"]
    assert found["days"] == {"served": 1, "completed": 0, "dismissed": 0, "snoozed": 0, NAME: 1}
    assert f'<th scope="col" class="number">{NAME}</th>' in found["page"]
    assert f'<td class="kind">{NAME}</td>' in found["page"]
    assert 0 < found["demo"][NAME] < min(count for name, count in found["demo"].items() if name != NAME)

    # The program with three actions is put back: what it does not know can still be read.
    database = await SqliteDatabase.open(database_path, readers=1)
    events = await SqlUsers(database).newest_events("ann", 10)
    await database.close()
    assert [getattr(item.logged.event, "action", None) for item in events] == [NAME, None]
