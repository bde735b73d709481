"""The process beside: reads decisions from its standard input, writes shadows to its standard output.

Invariant: it ends when its input does, so it never outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import BinaryIO

from app.aside.frames import framed, read_frame
from app.aside.wire import decode_decisions, encode_failure, encode_shadows
from app.bandit.lineup import Lineup
from app.bandit.shadows import shadows_of

NICENESS = 19


def work(asked: BinaryIO, told: BinaryIO) -> None:
    """Answer frame by frame until there is no more."""
    lineup = Lineup.of(shadow=True)
    while (message := read_frame(asked)) is not None:
        try:
            answer = encode_shadows(shadows_of(decode_decisions(message), lineup))
        except Exception as error:  # told to who asked, who logs it
            answer = encode_failure(f"{type(error).__name__}: {error}")
        told.write(framed(answer))
        told.flush()


def main() -> None:
    """Until the end of the input, whatever signals are sent to the process group."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(NICENESS)
    try:
        work(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        # Nobody reads any more. Python would try once more to write what is left, and complain.
        os._exit(0)


if __name__ == "__main__":
    main()
