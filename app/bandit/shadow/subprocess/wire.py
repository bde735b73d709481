"""Encodes decisions for the shadow subprocess, and the shadows or the error that it answers with.

Arrays are sent as their bytes in memory, since both processes run on the same machine, and decoded without a copy.
Encoding or decoding a decision takes microseconds. Invariant: decoded values equal the encoded ones to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from app.bandit.decisions import Ranking, Role, Shadow
from app.bandit.model.inputs import CANDIDATE_FACTORS, Array, Factors
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.numpy_on_demand import np
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
    """The answer of the subprocess if it could not compute shadows, with the reason."""

    reason: str


class _Answers(msgspec.Struct, array_like=True, tag=True):
    shadows: list[Shadow]


_encode = msgspec.msgpack.Encoder().encode
_questions = msgspec.msgpack.Decoder(list[_Question]).decode
_answers = msgspec.msgpack.Decoder(_Answers | Failure).decode


def encode_decisions(group: Sequence[Unshadowed]) -> bytes:
    """Encode a question to the subprocess: the decisions whose shadows are wanted."""
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
    """Decode a question in the subprocess.

    Raises:
        msgspec.DecodeError: the message is not a question.
        ValueError: an array has an impossible length.
    """
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
    """Encode an answer of the subprocess."""
    return _encode(_Answers(list(shadows)))


def encode_failure(reason: str) -> bytes:
    """Encode the answer of a subprocess that could not compute the shadows."""
    return _encode(Failure(reason))


def decode_answer(message: bytes) -> list[Shadow] | Failure:
    """Decode an answer in the process that sent the question.

    Raises:
        msgspec.DecodeError: the message is not an answer.
    """
    answer = _answers(message)
    return answer if isinstance(answer, Failure) else answer.shadows


def _array(place: bytes) -> Array:
    return np.frombuffer(place)
