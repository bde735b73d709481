"""Randomness derived from a decision's id: the same id gives the same numbers, in any process, at any time.

Each use has a stream of its own, so that numbers drawn for one never move those of another: the old inputs' draws are
the same whether or not there are new ones, and which action is taken does not depend on how many draws were made.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from app.bandit.model.inputs import Array

OLD: Final = "old"
NEW: Final = "new"
ACTION: Final = "action"


def fill_normal(place: Array, decision_id: str, stream: str) -> None:
    """Fills `place`, contiguous in memory, with independent standard normals."""
    bits = np.random.PCG64DXSM(_Digest(decision_id, stream))  # type: ignore[arg-type]  # the stubs want a SeedSequence
    np.random.Generator(bits).standard_normal(out=place)


def uniform(decision_id: str, stream: str) -> float:
    """One number in [0, 1), of 53 random bits."""
    return (int.from_bytes(_digest(decision_id, stream)[:8], "little") >> 11) * 2.0**-53


def _digest(decision_id: str, stream: str) -> bytes:
    return hashlib.sha256(f"{decision_id}:{stream}".encode()).digest()


class _Digest(ISeedSequence):
    """Seeds a generator with a digest, whose 256 bits are random enough; NumPy's own way costs ten times as much."""

    def __init__(self, decision_id: str, stream: str) -> None:
        self._bytes = _digest(decision_id, stream)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.frombuffer(self._bytes, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)
