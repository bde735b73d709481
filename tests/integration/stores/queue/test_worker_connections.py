"""The connections of the worker: they send what redis-py sends. `test_worker.py` tests the worker itself."""

import pytest
from redis.exceptions import DataError

from app.stores.queue.worker import _client
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.waiting import eventually


async def test_commands_packed_by_hiredis_arrive_intact(own_valkey: EmbeddedServer) -> None:
    client = _client(own_valkey.url, "arq:queue")
    try:
        values: dict[str | bytes, bytes | str | int | float] = {"a": b"\x00\xff", b"b": "ä", "c": 7, "d": 0.5, "e": ""}
        async with client.pipeline(transaction=True) as together:
            for name, value in values.items():
                together.set(name, value)
            together.zadd("z", {"one": 1, "two": 2})
            await together.execute()
        assert await client.mget(list(values)) == [b"\x00\xff", "ä".encode(), b"7", b"0.5", b""]
        assert await client.zrangebyscore("z", min=float("-inf"), max=1.5) == [b"one"]
        assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}  # a name of two words
        with pytest.raises(DataError):
            await client.set("f", object())  # type: ignore[arg-type]  # what is meant
    finally:
        await client.aclose(close_connection_pool=True)


async def test_broken_connection_is_replaced(own_valkey: EmbeddedServer) -> None:
    client = _client(own_valkey.url, "arq:queue")
    try:
        first = await client.client_id()
        assert await client.client_id() == first, "the same connection serves again"
        (connection,) = client.connection_pool._available_connections
        await client.client_kill_filter(_id=str(first), skipme=False)
        await eventually(lambda: connection._reader is None or connection._reader.at_eof())
        second = await client.client_id()
        assert second != first
        assert connection._reader is not None
        connection._reader.feed_data(b"+what nobody asked for\r\n")
        assert await client.client_id() not in {first, second}
    finally:
        await client.aclose(close_connection_pool=True)
