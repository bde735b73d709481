"""What the process beside does: reads decisions, writes shadows."""

from __future__ import annotations

from typing import BinaryIO

from app.bandit.model.policies import Policies
from app.bandit.shadow.scores import shadows_of
from app.bandit.shadow.subprocess.frames import framed, read_frame
from app.bandit.shadow.subprocess.wire import decode_decisions, encode_failure, encode_shadows


def work(asked: BinaryIO, told: BinaryIO) -> None:
    """Answer frame by frame until there is no more."""
    policies = Policies.of(shadow=True)
    while (message := read_frame(asked)) is not None:
        try:
            answer = encode_shadows(shadows_of(decode_decisions(message), policies))
        except Exception as error:  # told to who asked, who logs it
            answer = encode_failure(f"{type(error).__name__}: {error}")
        told.write(framed(answer))
        told.flush()
