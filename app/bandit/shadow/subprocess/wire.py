"""Decisions on their way to the process beside, and shadows on their way back.

Invariant: what is decoded is what was encoded, to the last bit. Arrays travel as the bytes that they are in memory,
for both ends are on one machine, and are read in place: all this is done on the event loop, in some microseconds each.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from app.bandit.decisions import Ranking, Role, Shadow
from app.bandit.model.inputs import CANDIDATE_FACTORS, Array, Factors
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.shadow.scores import Unshadowed


class _Question(msgspec.Struct, array_like=True, gc=False):
    decision_id: str
    role: Role
    explore: bool
    chosen: int
    elapsed_us: int
    spec_hash: str
    decisions: int
    scores: bytes
    pi: bytes
    size: int
    numbers: bytes
    mu: bytes
    by_candidate: bytes
    shared: bytes


class Failure(msgspec.Struct, array_like=True, tag=True):
    """Instead of shadows: why there are none."""

    reason: str


class _Answers(msgspec.Struct, array_like=True, tag=True):
    shadows: list[Shadow]


_encode = msgspec.msgpack.Encoder().encode
_questions = msgspec.msgpack.Decoder(list[_Question]).decode
_answers = msgspec.msgpack.Decoder(_Answers | Failure).decode


def encode_decisions(group: Sequence[Unshadowed]) -> bytes:
    """To the process beside."""
    return _encode(
        [
            _Question(
                item.decision_id,
                item.role,
                item.explore,
                item.chosen,
                item.elapsed_us,
                item.statistics.spec_hash,
                item.statistics.decisions,
                item.own.scores.tobytes(),
                item.own.pi.tobytes(),
                item.statistics.size,
                item.statistics.numbers.tobytes(),
                item.mu.tobytes(),
                item.factors.by_candidate.tobytes(),
                item.factors.shared.tobytes(),
            )
            for item in group
        ]
    )


def decode_decisions(message: bytes) -> list[Unshadowed]:
    """There. Raises `msgspec.DecodeError`, or ValueError where arrays do not fit each other."""
    return [
        Unshadowed(
            item.decision_id,
            item.role,
            item.explore,
            item.chosen,
            item.elapsed_us,
            Ranking(_array(item.scores), _array(item.pi)),
            SufficientStatistics(item.spec_hash, item.size, _array(item.numbers), item.decisions),
            _array(item.mu),
            Factors(_array(item.by_candidate).reshape(-1, len(CANDIDATE_FACTORS)), _array(item.shared)),
        )
        for item in _questions(message)
    ]


def encode_shadows(shadows: Sequence[Shadow]) -> bytes:
    """Back."""
    return _encode(_Answers(list(shadows)))


def encode_failure(reason: str) -> bytes:
    """Back, where it failed."""
    return _encode(Failure(reason))


def decode_answer(message: bytes) -> list[Shadow] | Failure:
    """Here. Raises `msgspec.DecodeError`."""
    answer = _answers(message)
    return answer if isinstance(answer, Failure) else answer.shadows


def _array(place: bytes) -> Array:
    return np.frombuffer(place)
