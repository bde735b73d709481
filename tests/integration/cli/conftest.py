"""The command line, run in this process: quick, and with its output and exit code at hand."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.cli import main, output
from app.features.clock import DAY_MS
from tests.support.events import feedback, payload, served
from tests.support.logs import logging_put_back
from tests.support.registry import FEATURES
from tests.support.traffic import now_ms


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs `profiles …` in an empty directory, as a person does. Settings by keyword: `database=…`."""
    for name in [name for name in os.environ if name.startswith("PROFILES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(output.out(), "_width", 250)
    monkeypatch.setattr(output.err(), "_width", 250)
    monkeypatch.chdir(tmp_path)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str, **settings: object) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["profiles", *arguments])
            for name, value in {"features": FEATURES, **settings}.items():
                patch.setenv(f"PROFILES_{name.upper()}", str(value))
            capsys.readouterr()
            code = 0
            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    with logging_put_back():  # the command wrote its log to a stream that is gone then
        yield run
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture
def migrated(profiles: Run) -> Run:
    """The same, with the default database made."""
    assert profiles("migrate").code == 0
    return profiles


def write_events(path: Path, *events: dict[str, Any]) -> str:
    """Newline-delimited JSON; the path as an argument."""
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


@pytest.fixture
def lived_in(migrated: Run, tmp_path: Path) -> Run:
    """A database with some weeks of two users."""
    today = now_ms()
    events = [payload(served("ann", today - day * DAY_MS, event_id=f"s{day}")) for day in range(1, 41)]
    for day in range(1, 41):
        action = "completed" if day % 3 else "dismissed"
        shown = feedback(
            "ann" if day % 2 else "bob", today - day * DAY_MS, action, dwell_ms=day * 100, event_id=f"f{day}"
        )
        events.append(payload(shown))
    assert migrated("events", write_events(tmp_path / "events.ndjson", *events)).code == 0
    return migrated
