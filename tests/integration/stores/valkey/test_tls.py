"""TLS to one server, to the master of a Sentinel group and to a cluster: the options of the URL reach each connection,
and the certificate must name the server.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import CacheUnavailable
from app.features.ids import HASH_SLOTS
from app.settings.parsers import cache_url
from app.stores.queue.client import client
from app.stores.valkey.pool import blocking_pool
from tests.integration.stores.valkey.conftest import OpenCache
from tests.support.processes import free_port
from tests.support.servers import REDIS, StartServer, ask, binary
from tests.support.waiting import eventually_sync

REQUEST = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
HOSTS = {"name": "localhost", "address": "127.0.0.1"}

# The URL of a server, by the host that it is to be reached at (a key of `HOSTS`) and a trusted certificate.
Url = Callable[..., str]


def self_signed(directory: Path) -> tuple[str, str]:
    """A certificate for `localhost`, but no address, and its key."""
    certificate, key = str(directory / "certificate.pem"), str(directory / "key.pem")
    outputs = ["-keyout", key, "-out", certificate, "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*REQUEST.split(), *outputs], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module", params=["server", "sentinel", pytest.param("cluster", marks=pytest.mark.slow)])
def url(
    request: pytest.FixtureRequest,
    start_server: StartServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Url]:
    """Servers that demand a certificate of their clients, the one that they have."""
    certificate, key = self_signed(tmp_path_factory.mktemp("tls"))
    port = free_port()
    tls = {"tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": certificate, "tls-replication": "yes"}
    arguments = [part for name, value in tls.items() for part in (f"--{name}", value)]

    def options(trusted: str) -> str:
        return f"ssl_ca_certs={trusted}&ssl_certfile={certificate}&ssl_keyfile={key}"

    if request.param == "cluster":
        # By default the cluster port is `port` + 10,000, where the system may have given a port to another program.
        cluster = ("--tls-cluster", "yes", "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        node = start_server(REDIS, options=(*arguments, "--tls-port", str(port), *cluster))
        ask(node, "CLUSTER", "ADDSLOTSRANGE", 0, HASH_SLOTS - 1)
        eventually_sync(lambda: "cluster_state:ok" in str(ask(node, "CLUSTER", "INFO")))
        yield lambda host, trusted=certificate: f"rediss+cluster://{HOSTS[host]}:{port}/?{options(trusted)}"
        return
    start_server(REDIS, options=(*arguments, "--tls-port", str(port)))
    if request.param == "server":
        yield lambda host, trusted=certificate: f"rediss://{HOSTS[host]}:{port}/0?{options(trusted)}"
        return
    sentinel_port = free_port()
    lines = [f"{name} {value}" for name, value in tls.items()]
    lines += [f"port {sentinel_port}", "bind 127.0.0.1"]
    lines += ["sentinel resolve-hostnames yes", "sentinel announce-hostnames yes"]
    lines += [f"sentinel monitor {name} {host} {port} 1" for name, host in HOSTS.items()]
    conf = tmp_path_factory.mktemp("sentinel") / "sentinel.conf"
    conf.write_text("\n".join(lines) + "\n")
    with subprocess.Popen([binary(REDIS), str(conf), "--sentinel"], stdout=subprocess.DEVNULL) as sentinel:
        with closing(socket.socket()) as probe:
            eventually_sync(lambda: probe.connect_ex(("127.0.0.1", sentinel_port)) == 0)
        yield (
            lambda host, trusted=certificate: f"rediss://127.0.0.1:{sentinel_port}/0?sentinel={host}&{options(trusted)}"
        )
        sentinel.kill()


async def test_cache_works_when_the_certificate_names_the_server(url: Url, open_cache: OpenCache) -> None:
    await (await open_cache(url=cache_url(url("name")))).check()


async def test_server_is_refused_when_the_certificate_names_another(url: Url, open_cache: OpenCache) -> None:
    with pytest.raises(CacheUnavailable) as raised:
        await (await open_cache(url=url("address"))).check()
    assert "certificate" in raised.value.public_reason


async def test_names_are_not_compared_when_the_url_says_so(url: Url, open_cache: OpenCache) -> None:
    await (await open_cache(url=cache_url(url("address") + "&ssl_check_hostname=false"))).check()


async def test_certificate_of_an_unknown_authority_is_refused(url: Url, open_cache: OpenCache, tmp_path: Path) -> None:
    other, _ = self_signed(tmp_path)
    with pytest.raises(CacheUnavailable) as raised:
        await (await open_cache(url=url("name", other))).check()
    assert "certificate" in raised.value.public_reason


@pytest.mark.parametrize("url", ["server", "sentinel"], indirect=True)
async def test_queue_works_over_tls(url: Url) -> None:
    connections = blocking_pool(url("name"), 1, 1)
    queue = client(connections, "queue")
    assert await queue.ping()
    await queue.aclose(close_connection_pool=True)
