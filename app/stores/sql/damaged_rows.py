"""Skips rows that cannot be decoded, so that a damaged row affects no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import msgspec

from app.telemetry import logger

P = ParamSpec("P")
T = TypeVar("T")
# What the decoding of a damaged row raises, and the computation with the values in it.
DAMAGE: Final = (msgspec.MsgspecError, ValueError, LookupError, ArithmeticError)
log = logger("stores.decisions")


def readable(number: int, decode: Callable[P, T], *row: P.args, **named: P.kwargs) -> T | None:
    """Decode a row of `tip_scores`: call `decode` with `row`. If the row is damaged, log its number and return None."""
    try:
        return decode(*row, **named)
    except DAMAGE as error:
        log.warning("decision_unreadable", number=number, error=str(error))
        return None
