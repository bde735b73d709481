"""A real HAProxy with docker/haproxy.cfg."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import ROOT, free_port
from tests.support.programs import required
from tests.support.waiting import PATIENCE_S

CONFIG = ROOT / "docker" / "haproxy.cfg"


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
            [required("haproxy"), "-dW", "-db", "-f", path], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield port
        assert process.poll() is None, (directory / "haproxy.log").read_text()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
