"""The real shadow subprocess: bit-identical shadows, recovery after failures, and no orphan process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from app.bandit.decisions import Shadow
from app.bandit.model.policies import Policies
from app.bandit.shadow.scores import Unshadowed, shadows_of
from app.bandit.shadow.subprocess import process
from app.bandit.shadow.subprocess.process import ShadowSubprocess
from app.bandit.shadow.subprocess.wire import encode_shadows
from app.errors import Unavailable
from tests.support.waiting import eventually_sync
from tests.unit.bandit.model.test_batch_scoring import decided

# Starting it takes as long as importing NumPy with what cores the tests beside leave over.
PATIENCE_S = 60.0


@pytest.fixture
async def beside() -> AsyncIterator[ShadowSubprocess]:
    """Not yet started."""
    beside = ShadowSubprocess()
    yield beside
    await beside.close()


def group(*, count: int = 12, candidates: int = 3) -> list[Unshadowed]:
    """Decisions that differ in all they can."""
    return [
        decided(seed, 1 + (seed + candidates) % candidates, challenger=seed % 2 == 0, explore=seed % 5 > 0)
        for seed in range(count)
    ]


def assert_same(found: Sequence[Shadow], expected: Sequence[Shadow]) -> None:
    """To the last bit."""
    assert encode_shadows(found) == encode_shadows(expected)


def environment_of(pid: int | None) -> bytes:
    """What it was told by environment variables."""
    return Path(f"/proc/{pid}/environ").read_bytes()


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_shadows_are_those_that_this_process_would_have_made(beside: ShadowSubprocess) -> None:
    for decisions in (group(), group(count=1), group(count=40), group(count=4, candidates=100), []):
        assert_same(await beside.shadows(decisions), shadows_of(decisions, Policies.of(shadow=True)))


async def test_nothing_runs_until_there_is_a_decision(beside: ShadowSubprocess) -> None:
    before = beside.pid
    await beside.shadows(group(count=1))
    assert before is None
    assert beside.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, beside.pid) == 19
    if sys.platform == "linux":
        assert os.sched_getscheduler(beside.pid) == os.SCHED_IDLE


async def test_it_is_told_no_secrets(beside: ShadowSubprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROFILES_MODEL_KEY", "a-secret")
    await beside.shadows(group(count=1))
    told = environment_of(beside.pid)
    assert b"OPENBLAS_NUM_THREADS=1" in told
    assert b"PROFILES_" not in told


async def test_a_group_is_worked_out_anew_when_the_process_is_killed(beside: ShadowSubprocess) -> None:
    decisions = group()
    await beside.shadows(decisions)
    for _ in range(3):
        first = beside.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        asking = asyncio.create_task(beside.shadows(decisions))
        await asyncio.sleep(0)
        os.kill(first, signal.SIGKILL)
        assert_same(await asking, shadows_of(decisions, Policies.of(shadow=True)))
        assert beside.pid != first


async def test_signals_to_the_process_group_do_not_end_it(beside: ShadowSubprocess) -> None:
    await beside.shadows(group(count=1))
    first = beside.pid
    assert first is not None
    os.kill(first, signal.SIGTERM)
    os.kill(first, signal.SIGINT)
    await beside.shadows(group(count=1))
    assert beside.pid == first


async def test_it_says_so_when_the_process_dies_again_and_again(
    beside: ShadowSubprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/bin/false")
        with pytest.raises(Unavailable, match="died"):
            await beside.shadows(group(count=1))
        broken.setattr(sys, "executable", "/nowhere")
        with pytest.raises(Unavailable, match="cannot be started"):
            await beside.shadows(group(count=1))
    assert len(await beside.shadows(group(count=3))) == 3


async def test_it_is_started_anew_when_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "END_S", 0.01)
    beside = ShadowSubprocess(answer_s=0.2)
    beside._answer_s = PATIENCE_S
    await beside.shadows(group(count=1))
    beside._answer_s = 0.2
    first = beside.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
        await beside.shadows(group(count=1))
    assert not alive(first)
    beside._answer_s = PATIENCE_S
    assert len(await beside.shadows(group(count=1))) == 1
    await beside.close()


async def test_answers_stay_with_their_questions_when_one_is_given_up(beside: ShadowSubprocess) -> None:
    await beside.shadows(group(count=1))
    asking = asyncio.create_task(beside.shadows(group(count=200, candidates=100)))
    for _ in range(5):
        await asyncio.sleep(0)
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    decisions = group(count=2)
    assert_same(await beside.shadows(decisions), shadows_of(decisions, Policies.of(shadow=True)))


async def test_the_reason_is_told_when_shadows_cannot_be_worked_out(beside: ShadowSubprocess) -> None:
    (item,) = group(count=1)
    with pytest.raises(Unavailable, match="ValueError"):
        await beside.shadows([item._replace(mu=np.zeros(3))])
    pid = beside.pid
    assert len(await beside.shadows([item])) == 1
    assert beside.pid == pid


async def test_nobody_starts_it_again_when_it_was_closed(beside: ShadowSubprocess) -> None:
    await beside.shadows(group(count=1))
    pid = beside.pid
    assert pid is not None
    await beside.close()
    assert not alive(pid)
    with pytest.raises(Unavailable, match="process stops"):
        await beside.shadows(group(count=1))


async def test_closing_does_not_wait_for_one_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "END_S", 0.01)
    beside = ShadowSubprocess()
    await beside.shadows(group(count=1))
    pid = beside.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    asking = asyncio.create_task(beside.shadows(group(count=1)))
    await asyncio.sleep(0)
    await asyncio.wait_for(beside.close(), 20)
    with pytest.raises(Unavailable):
        await asking
    assert not alive(pid)


PARENT = """
import asyncio
from app.bandit.shadow.subprocess.process import ShadowSubprocess
from app.bandit.shadow.subprocess.wire import encode_shadows
from tests.system.shadow_subprocess.test_process import group

async def main():
    beside = ShadowSubprocess()
    await beside.shadows(group(count=1))
    print(beside.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_it_ends_when_the_process_that_started_it_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    eventually_sync(lambda: not alive(pid), PATIENCE_S)
