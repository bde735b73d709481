"""One process of the service under torture: `python -m tests.torture.launcher serve`, or `worker`.

It is the real command, with three things changed before it starts, each by an environment variable:
  TORTURE_CLOCK      a file of eight bytes, mapped into memory: nanoseconds that are added to `time.time` and
                     `time.time_ns`. So the wall clock of all processes can be stepped while they run.
  TORTURE_HESITATE   `probability:seconds`: how often, and how long at most, the protocol hesitates between its steps.
                     Every interleaving stays one that a busy machine could make; the rare ones are made often.
  TORTURE_MUTANT     the name of a fault that is built in (`tests.torture.mutants`); the checker must find it.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from pathlib import Path
from random import Random

_OFFSET = struct.Struct("q")


def shift_clock(path: Path) -> None:
    """From now on the wall clock of this process is the machine's and the offset in the file."""
    with path.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), _OFFSET.size)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + _OFFSET.unpack_from(shared)[0] / 1e9
    time.time_ns = lambda: real_ns() + _OFFSET.unpack_from(shared)[0]


def set_clock(path: Path, offset_ns: int) -> None:
    """Step the clock of every process that maps the file."""
    with path.open("r+b") as file:
        file.write(_OFFSET.pack(offset_ns))


def main() -> None:
    """Change what is asked for, then be `profiles …`."""
    if clock := os.environ.get("TORTURE_CLOCK"):
        shift_clock(Path(clock))
    # After the clock, which some modules take by name when they are imported.
    from app.cli import main as profiles  # noqa: PLC0415
    from tests.torture import mutants  # noqa: PLC0415

    if hesitation := os.environ.get("TORTURE_HESITATE"):
        probability, seconds = map(float, hesitation.split(":"))
        mutants.hesitate(Random(os.getpid()), probability, seconds)
    if mutant := os.environ.get("TORTURE_MUTANT"):
        mutants.MUTANTS[mutant]()
    profiles()


if __name__ == "__main__":
    sys.argv[0] = "profiles"
    main()
