"""The entry point of the shadow subprocess, which reads decisions from a socket on stdin and writes shadows to it.

Answers are not written to stdout, because text that a library prints there would be read as an answer. Invariant: the
subprocess ends when the socket is closed, so it never outlives the process that started it.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

STARTING = 5  # niceness while importing: the subprocess still gets a quarter of a busy core
WORKING = 19


def main() -> None:
    """Compute shadows until the socket is closed. SIGINT, SIGTERM and SIGHUP are ignored."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(STARTING)
    # Imported only now, because importing NumPy takes long enough to delay requests, or to be interrupted by a signal;
    # and not on first use, when the priority is the lowest.
    import numpy  # noqa: ICN001, F401, PLC0415

    from app.bandit.shadow.subprocess.work import work  # noqa: PLC0415

    _lower_priority()
    with suppress(BrokenPipeError, ConnectionResetError), open(sys.stdin.fileno(), "wb", closefd=False) as output:
        work(sys.stdin.buffer, output)
    # Without Python's shutdown, which takes time, and reports an error if buffered output cannot be written.
    os._exit(0)


def _lower_priority() -> None:
    """Give this process the lowest scheduling priority. On Linux, a core that runs it counts as idle to other tasks."""
    os.nice(WORKING - STARTING)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    main()
