"""Fixtures of every test, and Hypothesis' profile: the same examples on every run of the build."""

from __future__ import annotations

import gc
import os

from hypothesis import settings

pytest_plugins = [
    "tests.support.database",
    "tests.support.processes",
    "tests.support.servers",
    "tests.support.site",
]

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A full collection over all imported modules costs 0.1 s; with the default thresholds, collecting the tests makes 25.
gc.set_threshold(50_000, 20, 100)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
