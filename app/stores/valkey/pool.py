"""Connection pools for cache and queue, to one server or to the master of a Sentinel group. The forms of a URL:

    redis://host:6379/0        rediss://…        unix:///path/to/socket
    redis://sentinel1:26379,sentinel2:26379/0?sentinel=mymaster        (rediss:// for TLS to the master)
    redis+cluster://node1:6379,node2:6379/        rediss+cluster://…   (any nodes; a pool for each: `split_cluster_url`)

With TLS, the certificate must name the host of the connection. In a cluster or a Sentinel group, this is the address
that the node announces. `ssl_check_hostname=false` in the URL turns this check off.
"""

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from redis.asyncio.connection import BlockingConnectionPool, parse_url
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

PORT, SENTINEL_PORT = 6379, 26379
# The errors of an unreachable server. uvloop raises RuntimeError for a write after the connection was lost.
AWAY: Final = (RedisError, OSError, TimeoutError, RuntimeError)
IS_CLUSTER: Final = "it is a node of a cluster: write redis+cluster:// in the URL"
IS_NO_CLUSTER: Final = "it is not a node of a cluster: write redis:// in the URL"


def public_reason(error: Exception) -> str:
    """The reason why a server cannot be used, and the remedy; without an address, so that any client may see it."""
    text = str(error)
    if isinstance(error, AuthenticationError) or text.startswith(("WRONGPASS", "NOAUTH", "Authentication")):
        return "it refuses the user or the password: correct them in the URL"
    if isinstance(error, NoPermissionError) or text.startswith("NOPERM"):
        return "its user lacks permissions: grant the commands and keys (ACL SETUSER)"
    if "DB index is out of range" in text:
        return "it has no database of that number: correct the number in the URL, or raise `databases` on the server"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not trusted, or names another host: correct ssl_ca_certs or the host in the URL"
    return text if text in (IS_CLUSTER, IS_NO_CLUSTER) else "it does not answer"


class _GroupPool(SentinelConnectionPool, BlockingConnectionPool):
    """A pool for a Sentinel group. It also closes the connections to the sentinels."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # not for a new master, to which the pool connects now
            for client in self.sentinel_manager.sentinels:
                await client.aclose()


def blocking_pool(url: str, timeout_s: float, connections: int, **options: Any) -> BlockingConnectionPool:
    """A pool of up to `connections` connections to the server of a URL. Unlike redis-py's plain pool, it holds no lock
    while it connects. `timeout_s` limits waiting for a free connection, connecting, and each reply. Raises `ValueError`
    if the URL has none of the forms in the module's docstring."""
    parts = urlsplit(url)
    times = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    # No library name: redis-py swallows a cancellation while it announces one, and stopping would hang.
    options |= times | {"timeout": timeout_s, "max_connections": connections, "lib_name": None, "lib_version": None}
    if parts.scheme == "rediss":
        options["ssl_check_hostname"] = True  # redis-py's default is False
    name = parse_qs(parts.query).get("sentinel")
    if name is None:
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(url, **options)
        return pool
    credentials, at, hosts = parts.netloc.rpartition("@")
    addresses = [_address(host, SENTINEL_PORT) for host in hosts.split(",")]
    sentinel = Sentinel(addresses, **times)  # type: ignore[no-untyped-call]  # as redis-py left it
    of_one_host = parse_url(parts._replace(netloc=f"{credentials}{at}master").geturl())
    others = ("host", "connection_class", "sentinel")
    options |= {key: value for key, value in of_one_host.items() if key not in others}
    return _GroupPool(name[0], sentinel, ssl=parts.scheme == "rediss", **options)  # type: ignore[no-untyped-call]


def is_cluster(url: str) -> bool:
    return urlsplit(url).scheme.endswith("+cluster")


def split_cluster_url(url: str) -> tuple[Callable[[str], str], list[str]]:
    """A function that makes a node's URL from its `host:port`, and the addresses in `url`. Raises `ValueError`."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    scheme = parts.scheme.removesuffix("+cluster")
    pairs = [_address(host, PORT) for host in hosts.split(",")]
    addresses = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in pairs]
    return lambda address: f"{scheme}://{credentials}{at}{address}/?{parts.query}", addresses


def _address(text: str, default_port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?P<host>\[[0-9a-fA-F:]+\]|[^:\[\]]+)(?::(?P<port>\d+))?", text)
    if found is None:
        raise ValueError(f"{text!r} is not host:port")
    return found["host"].strip("[]"), int(found["port"] or default_port)
