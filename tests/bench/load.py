"""Load by wrk. The requests are prepared in a file, because formatting them during the run costs as much as serving."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

SECONDS = 3
SCRIPT = """
local requests = {}
local at = 0
init = function()
    local bodies = io.open("%s", "rb")
    for size in io.lines("%s") do requests[#requests + 1] = bodies:read(tonumber(size)) end
    bodies:close()
end
request = function()
    at = at %% #requests + 1
    return requests[at]
end
"""
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Load(NamedTuple):
    """Requests per second, and percentiles of the latency in seconds."""

    rate: float
    p50: float
    p99: float


class Target(NamedTuple):
    """A port, and the requests that are sent to it in turn."""

    port: int
    requests: Sequence[bytes]


def get(path: str, key: str | None = None) -> bytes:
    """The bytes of a GET."""
    credentials = f"X-API-Key: {key}\r\n" if key else ""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{credentials}\r\n".encode()


def post(path: str, body: bytes, key: str | None = None) -> bytes:
    """The bytes of a POST of JSON."""
    credentials = f"X-API-Key: {key}\r\n" if key else ""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{credentials}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def wrk_script(requests: Sequence[bytes], more: str = "") -> Iterator[str]:
    """The path of a script for wrk that sends the requests in turn; `more` is added to it."""
    with tempfile.TemporaryDirectory(prefix="wrk-") as name:
        sizes, bodies, script = (Path(name) / part for part in ("sizes", "bodies", "script.lua"))
        sizes.write_text("".join(f"{len(request)}\n" for request in requests))
        bodies.write_bytes(b"".join(requests))
        script.write_text(SCRIPT % (bodies, sizes) + more)
        yield str(script)


def wrk(port: int, requests: Sequence[bytes], connections: int, seconds: int = SECONDS) -> Load:
    """Send the requests in turn, repeatedly. Raises `AssertionError` if a request is not answered with 2xx."""
    with wrk_script(requests) as script:
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script]
        text = subprocess.run(
            [*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True, timeout=seconds + 60
        ).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise AssertionError(f"not every request was answered with 2xx: {text}")
    return Load(float(_found(r"Requests/sec:\s+([\d.]+)", text)[0]), _percentile(50, text), _percentile(99, text))


def alternately(
    targets: Sequence[Target], connections: int, *, rounds: int, seconds: int = 2
) -> tuple[list[Load], ...]:
    """Load the targets in alternating rounds; the loads of each target."""
    loads: tuple[list[Load], ...] = tuple([] for _ in targets)
    for _ in range(rounds):
        for target, taken in zip(targets, loads, strict=True):
            taken.append(wrk(target.port, target.requests, connections, seconds))
    return loads


def middle(loads: Sequence[Load], figure: Callable[[Load], float]) -> float:
    """The median of a figure of the loads."""
    return median(figure(load) for load in loads)


def p50(load: Load) -> float:
    return load.p50


def p99(load: Load) -> float:
    return load.p99


def cost(load: Load) -> float:
    """Seconds per request, over all connections."""
    return 1 / load.rate


def _found(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    assert found is not None, text
    return found.groups()


def _percentile(percent: int, text: str) -> float:
    number, unit = _found(rf"\s{percent}%\s+([\d.]+)(us|ms|s)\b", text)
    return float(number) * _UNITS[unit]
