"""Fixtures of every test, and Hypothesis' profiles.

In CI, the examples are the same on every run. `make unit` and `make quick` try 10 examples, `make test` 100.
"""

import gc
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = [
    "tests.support.processes",
    "tests.support.postgres",
    "tests.support.database",
    "tests.support.servers",
    "tests.support.cluster",
    "tests.support.site",
]

settings.register_profile("local", deadline=None)
settings.register_profile(
    "quick", deadline=None, max_examples=10, database=None, derandomize="CI" in os.environ, print_blob=True
)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# Until the tests are collected, there is little garbage, and looking for it takes an eighth of the time.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The quick tests use SQLite and a single Valkey: processes and databases of the others cost twice their time.
    for item in items:
        if {"start_postgres", "cluster"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    # Under `nohup` it is ignored, and every process that a test starts would inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # The quick tests write a thousand databases, which takes half the system time in memory.
    memory = Path("/dev/shm")  # pytest makes a directory of its own in it
    if config.option.markexpr == "not slow" and memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))
