"""References: `python -m tests.bench.reference_servers mget PORT URL`, or `arq URL`.

`mget` is a straightforward implementation of the reads: Litestar with one redis-py MGET a request, on the same server
as the service. `arq` is a worker whose only job deletes a key.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec
import uvloop
from arq.connections import RedisSettings, create_pool
from arq.worker import Worker
from litestar import Litestar, get, post
from redis.asyncio import BlockingConnectionPool, Redis

from app.stores.queue.worker import POLL_DELAY_S
from tests.bench.minimal_server import serve
from tests.support.registry import REGISTRY


class Users(msgspec.Struct):
    user_ids: list[str]


def key(user_id: str, feature: str) -> str:
    return f"reference:{user_id}:{feature}"


def mget(url: str) -> Litestar:
    pool: Any = BlockingConnectionPool.from_url(url, max_connections=64)
    redis: Any = Redis(connection_pool=pool)

    async def profiles(user_ids: list[str]) -> list[dict[str, Any]]:
        held = iter(await redis.mget([key(user_id, name) for user_id in user_ids for name in REGISTRY.names]))
        return [
            {"user_id": user_id, "features": {name: msgspec.json.decode(next(held)) for name in REGISTRY.names}}
            for user_id in user_ids
        ]

    @get("/profiles/{user_id:str}")
    async def one(user_id: str) -> dict[str, Any]:
        return (await profiles([user_id]))[0]

    @post("/profiles/batch", status_code=200)
    async def batch(data: Users) -> dict[str, Any]:
        return {"profiles": await profiles(data.user_ids)}

    return Litestar([one, batch], openapi_config=None, logging_config=None)


async def delete_key(context: dict[Any, Any], name: str) -> None:
    await context["redis"].delete(name)


async def _work(url: str) -> None:
    worker = Worker(
        functions=[delete_key],  # type: ignore[list-item]  # arq types a job by the arguments of every job
        redis_pool=await create_pool(redis_settings(url)),
        poll_delay=POLL_DELAY_S,
        keep_result=0,
        handle_signals=False,
    )
    running = asyncio.get_running_loop().create_task(worker.async_run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await asyncio.wait({running})
    await worker.close()


def redis_settings(url: str) -> RedisSettings:
    return RedisSettings(unix_socket_path=url.removeprefix("unix://").partition("?")[0])


if __name__ == "__main__":
    if sys.argv[1] == "arq":
        uvloop.run(_work(sys.argv[2]))
    else:
        uvloop.run(serve(mget(sys.argv[3]), int(sys.argv[2])))
