"""Load by wrk, with the requests prepared before it begins: formatting them as it goes costs as much as the server."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 3
# Takes the requests from a file, and the size of each from another.
PREPARED = """
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


def get(path: str, key: str | None = None) -> bytes:
    """A GET as it goes over the wire."""
    credentials = f"X-API-Key: {key}\r\n" if key else ""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{credentials}\r\n".encode()


def post(path: str, body: bytes, key: str | None = None) -> bytes:
    """A POST of JSON as it goes over the wire."""
    credentials = f"X-API-Key: {key}\r\n" if key else ""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{credentials}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def wrk(port: int, requests: Sequence[bytes], connections: int, seconds: int = SECONDS) -> Load:
    """Send the requests in turn, over and over. Raises `AssertionError` where one is not answered with a 2xx."""
    with tempfile.TemporaryDirectory(prefix="wrk-") as name:
        sizes, bodies, script = (Path(name) / part for part in ("sizes", "bodies", "script.lua"))
        sizes.write_text("".join(f"{len(request)}\n" for request in requests))
        bodies.write_bytes(b"".join(requests))
        script.write_text(PREPARED % (bodies, sizes))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script)]
        text = subprocess.run(
            [*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True, timeout=seconds + 60
        ).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise AssertionError(f"not every request was answered well: {text}")
    return Load(float(_found(r"Requests/sec:\s+([\d.]+)", text)[0]), _percentile(50, text), _percentile(99, text))


def _found(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    assert found is not None, text
    return found.groups()


def _percentile(percent: int, text: str) -> float:
    number, unit = _found(rf"\s{percent}%\s+([\d.]+)(us|ms|s)\b", text)
    return float(number) * _UNITS[unit]
