"""The service as processes, started from the command line and never left running.

All descendants of a `Program` have a mark in their environment, or work in its directory (a Valkey overwrites its
environment). `close` kills them by process id. The output of a program goes to a file, which assertion messages quote.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # publishes no types
import pytest

from tests.support.registry import FEATURES
from tests.support.waiting import PATIENCE_S, eventually_sync

ROOT = Path(__file__).parents[2]
MARK = "TEST_PROCESS_MARK"
EPHEMERAL_FROM = 32_768
PORTS = range(20_000, 30_000)


def _shuffled_ports() -> Iterator[int]:
    """The ports of this test process, none twice before all were used, because most are bound only later."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = PORTS[int(worker) :: count]
    return cycle(random.sample(ports, len(ports)))


_ports = _shuffled_ports()


def free_port() -> int:
    """An unused loopback port below the ephemeral ports, which the system assigns itself."""
    while True:
        port = next(_ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def await_listener(port: int) -> None:
    """Wait until a loopback port accepts connections."""
    with closing(socket.socket()) as probe:
        eventually_sync(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)


def family(mark: str, directory: Path) -> dict[int, str]:
    """The running processes that have the mark or work below the directory: process id to command line."""
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            below = Path(process.cwd()).is_relative_to(directory)
            if (below or process.environ().get(MARK) == mark) and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
    return found


def resident_mib(pid: int) -> float:
    """The resident memory of a process, in MiB."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def suspend(pid: int) -> None:
    """Stop a process by SIGSTOP, and wait until all its threads have stopped. On a busy machine, this takes a while, in
    which another thread than the main one may accept a connection. It would then stay without an answer."""
    os.kill(pid, signal.SIGSTOP)
    eventually_sync(lambda: all(stat.rpartition(") ")[2][0] == "T" for stat in _threads(pid)))


def _threads(pid: int) -> list[str]:
    return [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]


class Program:
    """One `python -m …` in a session of its own."""

    def __init__(
        self,
        arguments: tuple[str, ...],
        environment: dict[str, str],
        directory: Path,
        prefix: tuple[str, ...] = (),
        python: str | Path = sys.executable,
    ) -> None:
        """`prefix` is run before Python, and replaces itself by it, such as `ip netns exec …`."""
        self.name = " ".join(arguments)
        self.mark = uuid.uuid4().hex
        self.directory = directory
        self._log = directory / f"{self.mark}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*prefix, python, "-m", *arguments],
                cwd=directory,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """The output so far, of the program and its descendants."""
        return self._log.read_text(errors="replace")

    def family(self) -> dict[int, str]:
        """The program and its running descendants: process id to command line."""
        return family(self.mark, self.directory / "var" / "run")

    def child(self, *words: str) -> int:
        """The process id of the only descendant whose command line has these words; 0 if there is not exactly one."""
        found = [pid for pid, line in self.family().items() if all(word in line for word in words)]
        return found[0] if len(found) == 1 else 0

    def says(self, text: str) -> None:
        """Wait until the program prints `text`."""
        eventually_sync(lambda: text in self.output or not self.running)
        assert text in self.output, f"`{self.name}` did not print {text!r}:\n{self.output}"

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end of the program; its exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"`{self.name}` did not end within {timeout_s} s:\n{self.output}") from None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.send(number)
        return self.wait()

    def kill(self) -> None:
        """Send SIGKILL to the program, not to its descendants."""
        self._process.kill()
        self._process.wait()

    def close(self) -> dict[int, str]:
        """Kill the program and its descendants; the descendants that were still running."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        left = self.family()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually_sync(lambda: not self.family())
        return left


class Programs:
    """Starts programs, and closes all of them in `close`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._started: list[Program] = []

    def start(self, *arguments: str, directory: Path | None = None, module: str = "app", **settings: Any) -> Program:
        """Start `python -m app …`. The keyword `database=…` sets PROFILES_DATABASE, and so on."""
        environment = environment_of(**settings)
        program = Program((module, *arguments), environment, directory or self.directory)
        self._started.append(program)
        return program

    def close(self) -> None:
        for program in self._started:
            program.close()


@contextmanager
def interruptible(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a program that SIGINT interrupts, though a background job of a shell ignores it; kill it at the end."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **options) as running:
        signal.signal(signal.SIGINT, before)
        try:
            yield running
        finally:
            running.kill()


def environment_of(**settings: Any) -> dict[str, str]:
    """Our environment without PROFILES_…, with these settings and the registry of the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PROFILES_")}
    given = {"features": FEATURES, **settings}
    chosen = {f"PROFILES_{name.upper()}": str(value) for name, value in given.items() if value is not None}
    return {**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **chosen}


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    """Starts programs in the directory of the test, and closes them when the test ends."""
    started = Programs(tmp_path)
    yield started
    started.close()
