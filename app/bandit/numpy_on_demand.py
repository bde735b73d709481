"""Imports NumPy on the first use of `np`: it takes an eighth of the start-up time of a process, and 13 MB, and few
processes score requests."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
else:

    class _OnDemand:
        def __getattr__(self, name: str) -> Any:
            found = getattr(import_module("numpy"), name)
            setattr(self, name, found)  # the next use finds it without this call
            return found

    np = _OnDemand()

__all__ = ["np"]
