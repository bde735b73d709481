"""Watching rebuilds: told of every change, one look a tick for all, let go when it is over or the process stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest

import app.profiles.rebuild.progress as module
from app.errors import StoreUnavailable
from app.profiles.rebuild.progress import LONGEST_TICKS, QUIET_TICKS, RunProgress
from app.profiles.rebuild.runs import RebuildRepository, RebuildRun, State
from tests.support.waiting import eventually


def run(run_id: str = "run", done: int = 0, state: State = "running", touched_at_ms: int = 0) -> RebuildRun:
    """A run of ten users."""
    return RebuildRun(
        run_id, "all", None, ["tip_volume_30d"], state, done, 10, "", "ann", 0, 0, touched_at_ms or done, None, None
    )


class Book:
    """The runs as they are; counts the looks."""

    def __init__(self, *runs: RebuildRun) -> None:
        self.runs = {item.id: item for item in runs}
        self.looks: list[list[str]] = []
        self.broken = False

    async def progress(self, run_ids: Sequence[str]) -> list[RebuildRun]:
        self.looks.append(sorted(run_ids))
        if self.broken:
            raise StoreUnavailable("locked")
        return [self.runs[run_id] for run_id in run_ids]


class Ticks:
    """A tick passes when the test says so, or at once where it runs free."""

    def __init__(self) -> None:
        self.free = False
        self._waiting: list[asyncio.Future[None]] = []

    async def pause(self, _: float) -> None:
        if self.free:
            for _ in range(5):  # turns in which followers hear of the last tick
                await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def tick(self) -> None:
        """The next pause ends."""
        await eventually(lambda: self._waiting)
        self._waiting.pop().set_result(None)


class Scene:
    """A watch over a book, and the ticks between looks."""

    def __init__(self, *runs: RebuildRun) -> None:
        self.book = Book(*runs)
        self.ticks = Ticks()
        self.watch = RunProgress(cast(RebuildRepository, self.book), self.ticks.pause)

    def follow(self, run_id: str = "run") -> AsyncGenerator[RebuildRun | None, None]:
        """Begin to follow."""
        return self.watch.follow(self.book.runs[run_id])

    async def after(self, stream: AsyncGenerator[RebuildRun | None, None], *changes: RebuildRun) -> RebuildRun | None:
        """What a follower is told after some ticks, with a change in each."""
        telling = asyncio.ensure_future(anext(stream))
        for change in changes:
            self.book.runs[change.id] = change
            await self.ticks.tick()
        return await telling


async def test_follower_is_told_at_once_and_when_the_run_has_changed() -> None:
    scene = Scene(run())
    stream = scene.follow()
    assert await anext(stream) == run()
    assert await scene.after(stream, run(), run(done=3)) == run(done=3)
    ended = run(done=10, state="completed", touched_at_ms=11)
    assert await scene.after(stream, ended) == ended
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert scene.watch.followers == 0


async def test_follower_of_a_run_that_has_ended_is_told_so_without_a_look() -> None:
    scene = Scene(run(state="cancelled"))
    assert [item async for item in scene.follow()] == [run(state="cancelled")]
    assert scene.book.looks == []


async def test_one_look_a_tick_serves_everybody_when_many_follow() -> None:
    scene = Scene(run("a"), run("b"))
    streams = [scene.follow("a") for _ in range(20)] + [scene.follow("b") for _ in range(20)]
    for stream in streams:
        await anext(stream)
    scene.book.runs = {"a": run("a", done=1), "b": run("b", done=2)}
    telling = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await scene.ticks.tick()
    assert [cast(RebuildRun, item).done for item in await asyncio.gather(*telling)] == [1] * 20 + [2] * 20
    assert scene.book.looks == [["a", "b"]]
    for stream in streams:
        await stream.aclose()


async def test_nobody_looks_when_nobody_follows() -> None:
    scene = Scene(run())
    stream = scene.follow()
    await anext(stream)
    telling = asyncio.ensure_future(anext(stream))
    await scene.ticks.tick()
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)
    assert scene.watch.followers == 0
    await scene.ticks.tick()
    await eventually(lambda: scene.watch._looking is None)
    looks = len(scene.book.looks)
    again = scene.follow()
    await anext(again)
    assert await scene.after(again, run(done=1)) == run(done=1)
    assert len(scene.book.looks) == looks + 1
    await again.aclose()


async def test_follower_hears_a_heartbeat_when_nothing_changes_and_is_let_go_in_the_end() -> None:
    scene = Scene(run())
    scene.ticks.free = True
    told = [item async for item in scene.follow()]
    assert told == [run()] + [None] * (LONGEST_TICKS // QUIET_TICKS)
    assert len(scene.book.looks) == LONGEST_TICKS


async def test_everybody_is_let_go_at_once_when_the_process_stops() -> None:
    scene = Scene(run())
    streams = [scene.follow() for _ in range(3)]
    for stream in streams:
        await anext(stream)
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await eventually(lambda: scene.watch._looking is not None)
    scene.watch.stop()
    outcomes: list[Any] = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StopAsyncIteration] * 3
    assert [item async for item in scene.follow()] == [run()]
    await scene.watch.close()
    assert scene.watch._looking is None


async def test_follower_is_told_later_when_a_look_fails() -> None:
    scene = Scene(run())
    stream = scene.follow()
    await anext(stream)
    scene.book.broken = True
    telling = asyncio.ensure_future(anext(stream))
    await scene.ticks.tick()
    await eventually(lambda: len(scene.book.looks) == 1)
    assert not telling.done()
    scene.book.broken = False
    scene.book.runs["run"] = run(done=4)
    await scene.ticks.tick()
    assert await telling == run(done=4)
    await stream.aclose()


async def test_follower_never_goes_back_when_a_look_ends_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_TICKS", 1)
    scene = Scene(run(done=2))
    first = scene.follow()
    await anext(first)
    # Somebody else comes with a newer state than the look that is under way will bring.
    second = scene.watch.follow(run(done=5))
    await anext(second)
    assert await scene.after(first, run(done=2)) == run(done=5)
    assert await scene.after(second, run(done=2)) is None
    await first.aclose()
    await second.aclose()
