"""Random numbers derived from a decision's id: the same id gives the same numbers in every process.

Each use has its own stream, so the numbers of one use do not depend on how many another use draws. The normals of the
old inputs are the same with and without new inputs, and the sampled action does not depend on the number of draws.
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
    """Fill `place`, which must be contiguous, with independent standard normals."""
    bits = np.random.PCG64DXSM(_Digest(decision_id, stream))  # type: ignore[arg-type]  # the stubs want a SeedSequence
    np.random.Generator(bits).standard_normal(out=place)


def uniform(decision_id: str, stream: str) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (int.from_bytes(_digest(decision_id, stream)[:8], "little") >> 11) * 2.0**-53


def _digest(decision_id: str, stream: str) -> bytes:
    return hashlib.sha256(f"{decision_id}:{stream}".encode()).digest()


class _Digest(ISeedSequence):
    """Seeds a generator with the 256 bits of a SHA-256 digest; NumPy's SeedSequence takes ten times as long."""

    def __init__(self, decision_id: str, stream: str) -> None:
        self._bytes = _digest(decision_id, stream)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.frombuffer(self._bytes, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)
