"""Imports structlog as if rich were not installed.

structlog imports rich, if present, to format tracebacks. The logs of this service have plain tracebacks, and importing
rich took a tenth of a process's start. Invariant: all other modules import structlog from this one.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

_NONE = cast(ModuleType, None)  # None in `sys.modules` makes an import fail with ImportError
_before = sys.modules.get("rich")
sys.modules["rich"] = _NONE
try:
    import structlog  # noqa: TID251  # the only import
finally:
    if _before is None:
        del sys.modules["rich"]  # so that the command line can import it
    else:
        sys.modules["rich"] = _before

__all__ = ["structlog"]
