"""docker/postgres/start.sh with real servers: a standby confirms commits, takes over, and takes an old primary back."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import account, as_account, binaries
from tests.support.processes import ROOT, environment_of, free_port
from tests.support.waiting import PATIENCE_S, eventually_sync

pytestmark = pytest.mark.slow

PASSWORDS = {"profiles_password": 'it\'s "profiles"', "replication_password": "it's $replication"}
INSERT = "INSERT INTO kept VALUES ('{}') RETURNING pg_is_in_recovery()"
CREATE = "CREATE TABLE IF NOT EXISTS kept (value TEXT)"


class Node:
    """One of the two servers, as its container would run it."""

    def __init__(self, directory: Path, number: int, ports: tuple[int, int]) -> None:
        self.directory = directory / f"node-{number}"
        self.number = number
        self.port, self.other = ports[number - 1], ports[2 - number]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / f"node-{number}.log"
        self.directory.mkdir()
        if (name := account()) is not None:
            shutil.chown(self.directory, name)

    def alone(self) -> None:
        """Say, as the operator, that it may start without the other one."""
        (self.directory / "alone").touch()

    def start(self) -> None:
        """Start it; does not wait until it answers."""
        environment = {
            "PATH": f"{binaries()}:{os.environ['PATH']}",
            "PGDATA": str(self.directory / "data"),
            "PEER": f"host=127.0.0.1 port={self.other}",
            "SECRETS": str(self.directory.parent),
        }
        options = {"port": self.port, "cluster_name": f"postgres_{self.number}"}
        options |= {"unix_socket_directories": self.directory, "listen_addresses": "127.0.0.1"}
        arguments = [item for name, value in options.items() for item in ("-c", f"{name}={value}")]
        command = as_account("/bin/sh", self.directory.parent / "postgres" / "start.sh", *arguments)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def answers(self) -> bool:
        assert self._process is None or self._process.poll() is None, self.output
        return self.psql("SELECT 1").returncode == 0

    def psql(self, sql: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a statement as the superuser, on the server's own socket."""
        return self._psql(f"host={self.directory} port={self.port} user=postgres dbname=profiles", sql, timeout_s)

    def as_service(self, sql: str, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        """Run a statement as the service does: on whichever server accepts writes."""
        where = f"host=127.0.0.1,127.0.0.1 port={self.port},{self.other} target_session_attrs=read-write"
        return self._psql(f"{where} user=profiles dbname=profiles connect_timeout=20", sql, timeout_s)

    def standbys(self) -> str:
        return self.psql("SELECT application_name, state, sync_state FROM pg_stat_replication").stdout.strip()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)
            self._process = None

    def waits(self, role: str) -> None:
        """Wait until it says that it waits for the other server, which is `role`."""
        eventually_sync(lambda: f"waiting for the other server, which is {role}" in self.output)

    def _psql(self, where: str, sql: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        command = [str(binaries() / "psql"), "-XAtq", "-d", where, "-c", sql]
        environment = {**os.environ, "PGPASSWORD": PASSWORDS["profiles_password"]}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def replicates(primary: Node, standby: Node) -> bool:
    wanted = f"postgres_{standby.number}|streaming|quorum"
    return primary.answers() and standby.answers() and primary.standbys() == wanted


def migrates(node: Node) -> bool:
    """Whether `profiles migrate` finds the primary, by a URL with both servers and no password."""
    hosts = f"127.0.0.1:{node.other},127.0.0.1:{node.port}"
    url = f"postgresql://profiles@{hosts}/profiles?target_session_attrs=read-write"
    environment = {**environment_of(database=url), "PGPASSWORD": PASSWORDS["profiles_password"]}
    command = [sys.executable, "-m", "app", "migrate"]
    return subprocess.run(command, env=environment, timeout=PATIENCE_S, check=False).returncode == 0


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    """Both servers, not started. The directory is one that the other account may enter."""
    binaries()
    with tempfile.TemporaryDirectory(prefix="standby-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        shutil.copytree(ROOT / "docker" / "postgres", directory / "postgres")
        for file, password in PASSWORDS.items():
            (directory / file).write_text(password + "\n")
        ports = (free_port(), free_port())
        pair = Node(directory, 1, ports), Node(directory, 2, ports)
        yield pair
        for node in pair:
            node.stop(signal.SIGQUIT)


def test_standby_confirms_commits_and_takes_over(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    for node in nodes:
        node.start()
        node.waits("unreachable")
    first.alone()
    eventually_sync(lambda: replicates(first, second))
    assert migrates(first)
    assert first.as_service(CREATE).returncode == 0
    assert first.as_service(INSERT.format("before")).stdout.strip() == "f"
    # Confirmed is what the standby has written; it replays it a moment later.
    eventually_sync(lambda: second.psql("SELECT value FROM kept").stdout.split() == ["before"])

    first.stop(signal.SIGQUIT)  # without a checkpoint, as in a crash
    assert second.psql("SELECT pg_promote()").stdout.strip() == "t"
    with pytest.raises(subprocess.TimeoutExpired):
        first.as_service(INSERT.format("not confirmed yet"), timeout_s=1)
    first.start()
    eventually_sync(lambda: replicates(second, first))
    assert first.psql("SELECT pg_is_in_recovery()").stdout.strip() == "t", first.output
    assert migrates(first)
    assert first.as_service(INSERT.format("after")).stdout.strip() == "f"
    eventually_sync(lambda: {"before", "after"} <= set(first.psql("SELECT value FROM kept").stdout.splitlines()))

    # Each comes back as what it was.
    for node in nodes:
        node.stop()
    for node in nodes:
        node.start()
    eventually_sync(lambda: replicates(second, first))
    assert first.as_service(INSERT.format("again")).stdout.strip() == "f"


def test_primary_works_alone_when_the_operator_says_so(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    first.alone()
    first.start()
    eventually_sync(first.answers)
    # No commit is acknowledged without the standby.
    with pytest.raises(subprocess.TimeoutExpired):
        first.as_service("CREATE TABLE unconfirmed (value TEXT)", timeout_s=1)
    first.psql("ALTER SYSTEM SET synchronous_standby_names = ''")
    first.psql("SELECT pg_reload_conf()")
    assert first.as_service(CREATE).returncode == 0
    assert first.as_service(INSERT.format("alone")).stdout.strip() == "f"

    # The standby takes over the data, and not this setting.
    second.start()
    eventually_sync(lambda: second.answers() and "streaming|async" in first.standbys())
    first.stop()
    second.psql("SELECT pg_promote()")
    assert second.psql("SELECT value FROM kept").stdout.split() == ["alone"]
    assert "postgres_1" in second.psql("SHOW synchronous_standby_names").stdout


def test_former_primary_does_not_answer_while_the_other_may_have_been_promoted(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    first.alone()
    for node in nodes:
        node.start()
    eventually_sync(lambda: replicates(first, second))
    first.stop(signal.SIGQUIT)
    second.psql("SELECT pg_promote()")
    second.stop()
    first.start()
    first.waits("unreachable")
    assert first.psql("SELECT 1").returncode != 0
    second.alone()
    second.start()
    eventually_sync(lambda: replicates(second, first))


def test_server_without_data_creates_no_second_database(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    first.alone()
    for node in nodes:
        node.start()
    eventually_sync(lambda: replicates(first, second))
    first.stop()
    shutil.rmtree(first.directory / "data")
    first.alone()  # by mistake: the other one is there, and was not promoted
    first.start()
    first.waits("standby")
    second.psql("SELECT pg_promote()")
    eventually_sync(lambda: replicates(second, first))
    assert not (first.directory / "alone").exists()  # it holds for one start
