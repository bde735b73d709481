"""structlog, imported as if rich were not installed.

structlog draws tracebacks with rich where there is one. Ours are plain on purpose (`app.telemetry`), and importing rich
took a tenth of the start of a process that then never used it. Invariant: structlog is imported from here alone.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

_NONE = cast(ModuleType, None)  # in `sys.modules` that is Python's way to say: there is no such module
_before = sys.modules.get("rich")
sys.modules["rich"] = _NONE
try:
    import structlog  # noqa: TID251  # the one place
finally:
    if _before is None:
        del sys.modules["rich"]  # the command line draws with it
    else:
        sys.modules["rich"] = _before

__all__ = ["structlog"]
