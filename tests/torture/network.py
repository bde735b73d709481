"""Hosts for a run: network namespaces on one bridge, with packet filters between them.

The program runs in namespaces of its own for the network, mounts and processes. Its temporary files are in memory. When
its first process ends, even by SIGKILL, the kernel ends all others and removes the network and the files.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from tests.support.postgres import found_binaries

INSTALL = "apt-get install"
PACKAGES = {"unshare": "util-linux", "setpriv": "util-linux", "ip": "iproute2", "iptables": "iptables"}
ISOLATE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
ISOLATED = "TORTURE_ISOLATED"
FILES = "/run"  # also has the names of network namespaces
OWN = "10.0.0.254"  # the address of this program
SUBNET = "10.0.0.0/24"
RESET = ("-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
DROP = ("-j", "DROP")
OUT, IN = ("OUTPUT", "-d"), ("INPUT", "-s")
BOTH = (OUT, IN)


def obstacle() -> str | None:
    """Why this program cannot make hosts; None if it can."""
    if sys.platform != "linux":
        return "several hosts need Linux"
    if os.geteuid() != 0:
        return "several hosts need root, for network namespaces"
    for program, package in PACKAGES.items():
        if shutil.which(program) is None:
            return f"several hosts need the program {program}: {INSTALL} {package}"
    if found_binaries() is None:
        return f"several hosts need PostgreSQL: {INSTALL} postgresql"
    attempt = "mount -t tmpfs tmpfs /run && ip link add bridge type bridge && iptables -A INPUT -j DROP"
    done = subprocess.run([*ISOLATE, "sh", "-c", attempt], capture_output=True, text=True, check=False)
    return f"several hosts need network namespaces: {done.stderr.strip()}" if done.returncode else None


def isolate() -> None:
    """Run this program again in namespaces of its own, as their first process; return if it is that process."""
    if os.environ.get(ISOLATED):
        return
    environment = {**os.environ, ISOLATED: "1", "TMPDIR": FILES}
    os.execvpe(ISOLATE[0], [*ISOLATE, sys.executable, "-m", "tests.torture", *sys.argv[1:]], environment)  # noqa: S606


class Host:
    """A network namespace with one address. Commands with `prefix` before them run in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.prefix = ("ip", "netns", "exec", name)

    @contextmanager
    def filtered(self, *rules: Sequence[str]) -> Iterator[None]:
        """Add rules of iptables, each a chain and its conditions and target, for the block."""
        with ExitStack() as stack:
            for chain, *rest in rules:
                _run(*self.prefix, "iptables", "-w", "-A", chain, *rest)
                stack.callback(_run, *self.prefix, "iptables", "-w", "-D", chain, *rest)
            yield

    def apart(
        self, *others: str, directions: Sequence[tuple[str, str]] = BOTH, target: Sequence[str] = DROP
    ) -> AbstractContextManager[None]:
        """Drop or reset what this host and other addresses send each other, or only one direction of it."""
        return self.filtered(*((chain, option, other, *target) for other in others for chain, option in directions))


class Network:
    """A bridge with hosts. This program has an address on it, too."""

    def __init__(self) -> None:
        _run("mount", "-t", "tmpfs", "tmpfs", FILES)
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", "bridge", "type", "bridge")
        _run("ip", "address", "add", f"{OWN}/24", "dev", "bridge")
        _run("ip", "link", "set", "bridge", "up")
        self._count = 0

    def host(self, name: str) -> Host:
        """Add a host."""
        self._count += 1
        host = Host(name, f"10.0.0.{self._count}")
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", name, "master", "bridge", "up")
        _run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", device, "up")
        return host


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
