"""The command line, run in this process: quick, and with its output and exit code at hand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.bootstrap.service import open_service
from app.cli import common, main
from app.concurrency.tasks import stop_signals
from app.features.clock import DAY_MS
from app.features.events import TipEvent
from app.settings import Settings
from tests.support.database import copy_database
from tests.support.events import feedback, served
from tests.support.logs import logging_put_back
from tests.support.processes import free_port
from tests.support.registry import FEATURES
from tests.support.traffic import now_ms


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs `profiles …` in an empty directory, as a person does. Settings by keyword: `database=…`."""
    for name in [name for name in os.environ if name.startswith("PROFILES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(common.out(), "width", 250)
    monkeypatch.setattr(common.err(), "width", 250)
    monkeypatch.chdir(tmp_path)
    # A command's alarm would replace that of the test's time limit. Signals are tested in processes of their own.
    monkeypatch.setattr(common, "_cancelled_by_signals", lambda _: nullcontext())
    signals = {number: signal.getsignal(number) for number in stop_signals()}

    def run(*arguments: str, **settings: object) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["profiles", *arguments])
            ports = {"port": free_port(), "worker_metrics_port": free_port()}
            for name, value in {"features": FEATURES, "cache_timeout_ms": 5_000, **ports, **settings}.items():
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
def migrated(profiles: Run, migrated_template: Path, tmp_path: Path) -> Run:
    """`profiles`, in a directory with a migrated, empty database at the default path."""
    copy_database(migrated_template, default_database(tmp_path), tmp_path.name)
    return profiles


def default_database(directory: Path) -> Path:
    """The path of `PROFILES_DATABASE`'s default under that directory, which is made."""
    path = directory / Settings().require_file()
    path.parent.mkdir(exist_ok=True)
    return path


def write_events(path: Path, *events: dict[str, Any]) -> str:
    """Newline-delimited JSON; the path as an argument."""
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return str(path)


@pytest.fixture(scope="session")
def forty_days_template(migrated_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with forty days of events of the users ann and bob."""
    path = copy_database(migrated_template, tmp_path_factory.mktemp("forty-days") / "profiles.db", "forty days")
    today = now_ms()
    events: list[TipEvent] = [served("ann", today - day * DAY_MS, event_id=f"s{day}") for day in range(1, 41)]
    for day in range(1, 41):
        user, action = "ann" if day % 2 else "bob", "completed" if day % 3 else "dismissed"
        events.append(feedback(user, today - day * DAY_MS, action, dwell_ms=day * 100, event_id=f"f{day}"))

    async def ingest() -> None:
        async with open_service(Settings(database=path, features=FEATURES), door="command") as service:
            await service.ingestor.ingest(events)

    asyncio.run(ingest())
    return path


@pytest.fixture
def lived_in(profiles: Run, forty_days_template: Path, tmp_path: Path) -> Run:
    """`profiles`, in a directory whose database has forty days of two users."""
    copy_database(forty_days_template, default_database(tmp_path), tmp_path.name)
    return profiles


def rows_shown(out: str) -> dict[str, str]:
    """The rows of a printed table, by their first cell."""
    cells = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if line.startswith("│")]
    return {name: value for _, name, value, _ in cells}
