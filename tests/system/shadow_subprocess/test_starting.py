"""Starting and ending the shadow subprocess: no process is left over, and no other process is mistaken for it."""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # publishes no types
import pytest

from app.bandit.model.policies import Policies
from app.bandit.shadow.scores import shadows_of
from app.bandit.shadow.subprocess import process
from app.bandit.shadow.subprocess.frames import framed
from app.bandit.shadow.subprocess.process import ShadowSubprocess
from app.bandit.shadow.subprocess.wire import encode_decisions, encode_failure, encode_shadows
from app.errors import Unavailable
from tests.system.shadow_subprocess.test_process import PATIENCE_S, group


def children() -> list[int]:
    """Those of this process that run the module, and those that ended and were not waited for."""
    return [
        child.pid
        for child in psutil.Process().children()
        if child.status() == psutil.STATUS_ZOMBIE or "app.bandit.shadow.subprocess" in " ".join(child.cmdline())
    ]


def open_files() -> list[int]:
    """The descriptors that this process holds."""
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


@contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_files())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    held: list[int] = []
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# In a process of its own: what other tests of this one leave to the collector closes files at any moment.
STOPPED_AT_EACH_STEP = """
import asyncio, sys
from contextlib import suppress
import uvloop
from app.bandit.shadow.subprocess.process import ShadowSubprocess
from app.errors import Unavailable
from tests.system.shadow_subprocess.test_process import group
from tests.system.shadow_subprocess.test_starting import children, open_files

async def one(steps, end):
    beside = ShadowSubprocess()
    asking = asyncio.create_task(beside.shadows(group(count=1)))
    for _ in range(steps):
        await asyncio.sleep(0)
    if end == "cancel":
        asking.cancel()
    else:
        await beside.close()
    with suppress(asyncio.CancelledError, Unavailable):
        await asking
    assert children() == [], steps

async def all_steps(end):
    for steps in range(8):
        await one(steps, end)
    await asyncio.sleep(0)

run = {"asyncio": asyncio.run, "uvloop": uvloop.run}[sys.argv[1]]
run(asyncio.sleep(0))  # uvloop keeps two for good
before = open_files()
run(all_steps(sys.argv[2]))
assert open_files() == before, (before, open_files())
"""


@pytest.mark.parametrize("loop", [pytest.param("asyncio", marks=pytest.mark.slow), "uvloop"])
@pytest.mark.parametrize("end", ["cancel", "close"])
def test_nothing_is_left_when_it_is_cancelled_or_closed_at_any_step_of_starting(loop: str, end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_EACH_STEP, loop, end], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_it_says_so_when_no_more_files_can_be_opened() -> None:
    beside = ShadowSubprocess()
    with no_more_files(), pytest.raises(Unavailable, match="cannot be started"):
        await beside.shadows(group(count=1))
    assert len(await beside.shadows(group(count=1))) == 1
    await beside.close()


async def test_it_runs_this_program_when_the_working_directory_holds_another_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "app" / "aside"
    other.mkdir(parents=True)
    for place in (other.parent / "__init__.py", other / "__init__.py", other / "__main__.py"):
        place.write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    beside = ShadowSubprocess()
    assert len(await beside.shadows(group(count=1))) == 1
    await beside.close()


UNHURRIED = """
import os
import pathlib
import signal
told = (os.nice(0), signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN)
pathlib.Path(__file__).with_suffix(".txt").write_text(str(told))
raise ImportError
"""


async def test_imports_run_at_a_lower_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text(UNHURRIED)
    monkeypatch.syspath_prepend(tmp_path)
    beside = ShadowSubprocess()
    with pytest.raises(Unavailable, match="died"):
        await beside.shadows(group(count=1))
    assert (tmp_path / "numpy.txt").read_text() == f"({os.nice(0) + 5}, True)"


async def test_answers_are_read_when_something_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('welcome')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    beside = ShadowSubprocess(answer_s=PATIENCE_S)
    assert len(await beside.shadows(group(count=1))) == 1
    await beside.close()


def test_it_ends_in_silence_when_nobody_takes_its_answer(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        beside = process._spawn(theirs)
    with ours:
        ours.sendall(framed(encode_decisions(group(count=1))))
        assert select.select([ours], [], [], PATIENCE_S)[0] == [ours]
    assert beside.wait(PATIENCE_S) == 0
    assert capfd.readouterr().err == ""


FAKE = """#!{python}
import os
import time
os.read(0, 4)
os.write(0, bytes.fromhex("{answer}"))
time.sleep(60)
"""


@pytest.mark.parametrize(
    "first",
    [
        b"\x93",
        encode_shadows([])[:-1],
        encode_shadows(shadows_of(group(count=2), Policies.of(shadow=True))),
        encode_shadows(shadows_of(group(count=1), Policies.of(shadow=True)))[:-10] + b"\xc4\x07" + bytes(7),
    ],
)
async def test_a_process_is_not_asked_again_when_it_answers_what_was_not_asked(
    first: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A second answer waits in the pipe, which would be taken for that of the next question.
    answer = framed(first) + framed(encode_failure("of another question"))
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, answer=answer.hex()))
    fake.chmod(0o755)
    monkeypatch.setattr(process, "END_S", 0.01)
    beside = ShadowSubprocess()
    with monkeypatch.context() as faked:
        faked.setattr(sys, "executable", str(fake))
        with pytest.raises(Unavailable, match="the shadow subprocess sent"):
            await beside.shadows(group(count=1))
    assert beside.pid is None
    assert len(await beside.shadows(group(count=1))) == 1
    await beside.close()
