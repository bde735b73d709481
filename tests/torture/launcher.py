"""Starts one process of the service: `python -m tests.torture.launcher serve`, or `worker`.

It is the real command with three changes, each controlled by an environment variable:
  TORTURE_CLOCK      A file of eight bytes, mapped into memory: nanoseconds that are added to `time.time` and
                     `time.time_ns`. So the wall clock of a process can be stepped while it runs.
  TORTURE_HESITATE   `probability:seconds`: the protocol pauses between its steps with this probability, for at most
                     this time. A busy machine could cause each of the interleavings; this makes rare ones frequent.
  TORTURE_MUTANT     The name of a fault to build in (`tests.torture.mutants`), which the run must find.
"""

import mmap
import os
import struct
import sys
import time
from pathlib import Path
from random import Random

_OFFSET = struct.Struct("q")


def shift_clock(path: Path) -> None:
    """Add the offset in the file to the wall clock of this process."""
    with path.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), _OFFSET.size)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + _OFFSET.unpack_from(shared)[0] / 1e9
    time.time_ns = lambda: real_ns() + _OFFSET.unpack_from(shared)[0]


def set_clock(path: Path, offset_ns: int) -> None:
    """Set the offset for the process that maps the file."""
    with path.open("r+b") as file:
        file.write(_OFFSET.pack(offset_ns))


def main() -> None:
    if clock := os.environ.get("TORTURE_CLOCK"):
        shift_clock(Path(clock))
    # Imported after the change of the clock, because some modules import its functions by name.
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
