"""Samples for tests."""

from __future__ import annotations

from typing import Any

import msgspec

from app.operations.samples import Sample
from tests.support.clock import NOW_MS


def sample(**changes: Any) -> Sample:
    """Ten seconds of an API process, up to now; fields by keyword."""
    plain = Sample(at_ms=NOW_MS, process="one", role="api", seconds=10.0)
    return msgspec.structs.replace(plain, **changes)
