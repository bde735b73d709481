"""Signals end a command after its cleanup, wherever they arrive."""

import signal
import subprocess
import sys

import pytest

from tests.support.processes import interruptible
from tests.support.waiting import PATIENCE_S

PROGRAM = """
import _thread, asyncio, os, signal, sys, threading, time, weakref
from pathlib import Path
from app.cli.common import as_command

def arrive():
    os.kill(os.getpid(), signal.{name})

async def in_a_callback_that_cannot_raise():
    class Item: pass
    item = Item()
    kept = weakref.ref(item, lambda _: arrive())
    del item
    await asyncio.sleep(60)

async def in_a_callback_that_blocks():
    class Item: pass
    def block(_):
        arrive()
        time.sleep(5)  # until the exception of the timer, which is dropped
    item = Item()
    kept = weakref.ref(item, block)
    del item
    await asyncio.sleep(60)

async def before_a_step_of_the_event_loop():
    step = asyncio.Handle._run
    def interrupted(handle):
        asyncio.Handle._run = step
        arrive()
        step(handle)
    asyncio.Handle._run = interrupted
    await asyncio.sleep(0)
    await asyncio.sleep(60)

async def while_a_read_blocks():
    asyncio.get_running_loop().call_soon(arrive)
    await asyncio.sleep(0)
    sys.stdin.buffer.read()

async def before_a_read_blocks():
    call = Path(f"/proc/{os.getpid()}/syscall")
    def arrive_unnoticed():
        while call.read_text().split()[1:2] != ["0x0"]:  # a call that has standard input as its first argument
            pass
        _thread.interrupt_main(signal.{name})  # the handler is due, but the read is not interrupted
    threading.Thread(target=arrive_unnoticed, daemon=True).start()
    sys.stdin.buffer.read()

async def twice():
    asyncio.get_running_loop().call_soon(arrive)
    try:
        await asyncio.sleep(60)
    finally:
        asyncio.get_running_loop().call_soon(arrive)
        await asyncio.sleep(60)

@as_command
async def command():
    try:
        await {where}()
    finally:
        await asyncio.sleep(0.01)
        print("cleaned up", flush=True)

command()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        *("in_a_callback_that_cannot_raise", "in_a_callback_that_blocks", "before_a_step_of_the_event_loop"),
        *("while_a_read_blocks", "before_a_read_blocks", "twice"),
    ],
)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)]
)
def test_signal_ends_a_command(where: str, number: signal.Signals, code: int) -> None:
    program = PROGRAM.replace("{name}", number.name).replace("{where}", where)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with interruptible([sys.executable, "-c", program], **pipes) as running:
        assert running.wait(PATIENCE_S) == code
        out, told = running.communicate()
    assert out == b"cleaned up\n"
    assert b"ignored" not in told
