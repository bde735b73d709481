"""Full disks: a small file system if this user may mount one, and otherwise a limit of file sizes."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.support.database import used_bytes

SIZE_MB = 24


class Disk(Protocol):
    """The disk of a database. `fill` leaves no room for these processes, until `make_room`."""

    directory: Path

    def fill(self, *pids: int) -> None: ...

    def make_room(self, *pids: int) -> None: ...


class SmallFileSystem:
    """A file system of a few megabytes. Another file fills it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / "filler"

    def fill(self, *_: int) -> None:
        """Write until not a byte is left."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (65_536, 4_096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def make_room(self, *_: int) -> None:
        self._filler.unlink()


class LimitedFiles:
    """A limit on the size of files at the last frame of the write-ahead log, so that no frame can be added.

    It works like a quota: the process can write below the limit, and not above it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def fill(self, *pids: int) -> None:
        (wal,) = self.directory.glob("*-wal")
        for pid in pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (used_bytes(wal), hard))

    def make_room(self, *pids: int) -> None:
        for pid in pids:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def small_file_system(directory: Path) -> Iterator[SmallFileSystem | None]:
    """Mount one on a directory; yields None if this user may not mount."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,nr_inodes=64", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        yield None
        return
    try:
        yield SmallFileSystem(directory)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True)
