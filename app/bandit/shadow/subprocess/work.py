"""The loop of the shadow subprocess: reads decisions, computes their shadows, and writes them as the answer."""

from __future__ import annotations

from typing import BinaryIO

from app.bandit.model.policies import Policies
from app.bandit.shadow.scores import shadows_of
from app.bandit.shadow.subprocess.frames import framed, read_frame
from app.bandit.shadow.subprocess.wire import decode_decisions, encode_failure, encode_shadows


def work(questions: BinaryIO, answers: BinaryIO) -> None:
    """Write one answer for each message in `questions`, until the stream ends."""
    policies = Policies.of(shadow=True)
    while (message := read_frame(questions)) is not None:
        try:
            answer = encode_shadows(shadows_of(decode_decisions(message), policies))
        except Exception as error:  # sent to the process that asked, which logs it
            answer = encode_failure(f"{type(error).__name__}: {error}")
        answers.write(framed(answer))
        answers.flush()
