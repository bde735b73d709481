"""A client of the queue, as programs that publish events have one."""

from arq.connections import ArqRedis

from app.stores.queue.client import MAX_CONNECTIONS, QUEUE, client
from app.stores.valkey.pool import blocking_pool

TIMEOUT_S = 20.0  # a job of many megabytes takes seconds on a busy machine


def connect(url: str, name: str = QUEUE) -> ArqRedis:
    return client(blocking_pool(url, TIMEOUT_S, MAX_CONNECTIONS), name)
