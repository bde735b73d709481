"""Fixtures of every test, and Hypothesis' profile: the same examples on every run of the build."""

from __future__ import annotations

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
