"""Signals end a command, wherever they arrive."""

import signal
import subprocess
import sys

import pytest

# The callback of a weak reference drops what is raised in it.
PROGRAM = """
import asyncio, os, signal, weakref
from app.cli.common import as_command

@as_command
async def work():
    class Item: pass
    item = Item()
    kept = weakref.ref(item, lambda _: os.kill(os.getpid(), signal.{name}))
    del item
    print("still running", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("cleaned up", flush=True)

work()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_command_ends_when_the_signal_arrives_where_nothing_can_be_raised(number: signal.Signals, code: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    command = [sys.executable, "-c", PROGRAM.format(name=number.name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        signal.signal(signal.SIGINT, before)
        out, told = running.communicate(timeout=30)
    assert (running.returncode, out) == (code, "still running\ncleaned up\n"), told
    assert "ignored" not in told
