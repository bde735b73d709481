"""Programs that some tests need. If one is missing, the test is skipped, and fails in CI."""

import os
import shutil
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def required(package: str, *names: str) -> str:
    """The path of the first of these programs that is installed; by default, of the one named after its Debian
    package."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    found = (shutil.which(name, path=path) for name in names or (package,))
    return next(filter(None, found), None) or missing(f"{package} is missing: apt-get install {package}")
