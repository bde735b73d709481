"""The process beside: its standard input is a socket, from which it reads decisions and to which it writes shadows.

Not its standard output: whatever prints there, on whatever machine, would be taken for an answer. Invariant: it ends
when its input does, so it never outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

STARTING = 5  # niceness, while importing: a quarter of a busy core
WORKING = 19


def main() -> None:
    """Until the end of the input, whatever signals are sent to the process group."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(STARTING)
    # Only now: it takes long enough to be in the way of requests, and to be met by a signal.
    from app.bandit.shadow.subprocess.work import work  # noqa: PLC0415

    _step_back()
    with suppress(BrokenPipeError, ConnectionResetError), open(sys.stdin.fileno(), "wb", closefd=False) as told:
        work(sys.stdin.buffer, told)
    # At once: Python would take its time to tidy up, and complain where it could not write what is left.
    os._exit(0)


def _step_back() -> None:
    """Take only what nobody else wants. On Linux a core that works here counts as idle to whoever wakes up."""
    os.nice(WORKING - STARTING)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    main()
