"""The process beside: its standard input is a socket, from which it reads decisions and to which it writes shadows.

Not its standard output: whatever prints there, on whatever machine, would be taken for an answer. Invariant: it ends
when its input does, so it never outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import os
import signal
import sys

NICENESS = 19


def main() -> None:
    """Until the end of the input, whatever signals are sent to the process group."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(NICENESS)
    # Only now: it takes long enough to be in the way of requests, and to be met by a signal.
    from app.aside.work import work  # noqa: PLC0415

    try:
        with open(sys.stdin.fileno(), "wb", closefd=False) as told:
            work(sys.stdin.buffer, told)
    except (BrokenPipeError, ConnectionResetError):
        # Nobody reads any more. Python would try once more to write what is left, and complain.
        os._exit(0)


if __name__ == "__main__":
    main()
