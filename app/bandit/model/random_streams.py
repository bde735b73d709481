"""Pseudo-random numbers derived from a decision's id: the same id gives the same numbers in every process.

Each use has a stream of its own, so its numbers do not depend on how many numbers another use draws. The streams are:
`OLD`, the normals for the inputs of the first spec; `NEW`, the normals for the inputs that later specs add; `ACTION`,
the number that samples the chosen candidate.
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
    """Fill `place`, which must be contiguous, with standard normals that depend on the decision and the stream only."""
    bits = np.random.PCG64DXSM(_Digest(decision_id, stream))  # type: ignore[arg-type]  # the stubs want a SeedSequence
    np.random.Generator(bits).standard_normal(out=place)


def uniform(decision_id: str, stream: str) -> float:
    """A pseudo-random number in [0, 1) with 53 bits, always the same for the same decision and stream."""
    return (int.from_bytes(_digest(decision_id, stream)[:8], "little") >> 11) * 2.0**-53


def _digest(decision_id: str, stream: str) -> bytes:
    return hashlib.sha256(f"{decision_id}:{stream}".encode()).digest()


class _Digest(ISeedSequence):
    """Seeds a generator with the 256 bits of a SHA-256 digest; NumPy's SeedSequence takes ten times as long."""

    def __init__(self, decision_id: str, stream: str) -> None:
        self._bytes = _digest(decision_id, stream)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.frombuffer(self._bytes, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)
