"""docker/valkey/create-cluster.sh with real servers, which run with the options of docker/compose.scale.yaml."""

import subprocess
from functools import partial
from pathlib import Path

import pytest
import yaml

from app.stores.valkey.embedded import EmbeddedServer
from tests.support.processes import EPHEMERAL_FROM, ROOT, free_port
from tests.support.programs import required
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.waiting import PATIENCE_S, eventually_sync

pytestmark = pytest.mark.slow

OPTIONS = yaml.safe_load((ROOT / "docker" / "compose.scale.yaml").read_text())["services"]["cache-1"]["command"][1:]
SCRIPT = ROOT / "docker" / "valkey" / "create-cluster.sh"
NODES = 6
BUS = 10_000  # the cluster's own port is higher by this much


def node_port() -> int:
    """A free port. That of the cluster's bus is above those of `free_port`, and below the ephemeral ones."""
    while (port := free_port()) + BUS >= EPHEMERAL_FROM:
        pass
    return port


def knows_every_node(server: EmbeddedServer) -> bool:
    return f"cluster_known_nodes:{NODES}" in ask(server, "CLUSTER", "INFO").decode().split()


def test_script_creates_a_cluster_once(start_server: StartServer, tmp_path: Path) -> None:
    client = required("redis-tools", "redis-cli")
    (tmp_path / "valkey-cli").symlink_to(client)
    servers = [start_server(VALKEY, port=node_port(), options=(*OPTIONS, "--bind", "127.0.0.1")) for _ in range(NODES)]
    command = ["/bin/sh", str(SCRIPT), *(f"127.0.0.1:{server.port}" for server in servers)]
    for _ in range(2):  # every start of the compose project runs it
        done = subprocess.run(
            command,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for server in servers:
            info = ask(server, "CLUSTER", "INFO").decode().split()
            assert {"cluster_state:ok", "cluster_size:3", "cluster_slots_ok:16384"} <= set(info)
            # Until a handshake of two nodes with each other is over, a node may count the other twice.
            eventually_sync(partial(knows_every_node, server))
