"""A real HAProxy with docker/haproxy.cfg. If Debian's package is missing, tests are skipped, and fail in CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.postgres import missing
from tests.support.processes import ROOT, free_port

CONFIG = ROOT / "docker" / "haproxy.cfg"
STOP_S = 10


def haproxy_path() -> str:
    """The path of HAProxy. If it is missing, the test is skipped, or fails in CI."""
    path = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    return path if path is not None else missing("haproxy is missing: apt-get install haproxy")


@contextmanager
def haproxy(directory: Path, ports: Sequence[int]) -> Iterator[int]:
    """HAProxy in front of the API hosts on these loopback ports, one for each host of the file; its port."""
    port = free_port()
    config = CONFIG.read_text()
    for number, host_port in enumerate(ports, 1):
        config, found = re.subn(rf"\bapi-{number}:8000\b", f"127.0.0.1:{host_port}", config)
        assert found == 2, "each host is in both backends"
    config, found = re.subn(r"(?m)^    bind :8000$", f"    bind 127.0.0.1:{port}", config)
    assert found == 1
    assert not re.search(r":8000$", config, re.MULTILINE), "no host is left"
    path = directory / "haproxy.cfg"
    path.write_text(config)
    with (directory / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(
            [haproxy_path(), "-dW", "-db", "-f", path], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield port
        assert process.poll() is None, (directory / "haproxy.log").read_text()
    finally:
        process.terminate()
        process.wait(STOP_S)
