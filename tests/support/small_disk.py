"""Disks that are really full: a small file system where we may mount one, and a limit of file sizes."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

SIZE_MB = 24


class Disk(Protocol):
    """Where a database lies."""

    directory: Path

    def fill(self, *pids: int) -> None:
        """From now on these processes find no room."""
        ...

    def make_room(self, *pids: int) -> None:
        """They find room again."""
        ...


class SmallFileSystem:
    """A file system of a few megabytes; it is full when another file takes what is left."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / "filler"

    def fill(self, *_: int) -> None:
        """Write until the system says that nothing is left, to the last byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (65_536, 4_096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def make_room(self, *_: int) -> None:
        """Delete that file."""
        self._filler.unlink()


class LimitedFiles:
    """A limit on the size of files, lowered to what the write-ahead log has reached: it cannot grow.

    For the process that is the same as a quota: what lies below the limit can be written, nothing above.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, *pids: int) -> None:
        """Nobody may write beyond what is there now."""
        (wal,) = self.directory.glob("*-wal")
        for pid in pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (wal.stat().st_size, hard))

    def make_room(self, *pids: int) -> None:
        """Lift the limit."""
        for pid in pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def small_file_system(directory: Path) -> Iterator[SmallFileSystem | None]:
    """One, mounted on a directory; None where this user may not mount."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,nr_inodes=64", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield SmallFileSystem(directory)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True)
