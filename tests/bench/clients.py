"""CPU time that a read costs the caller, with 32 reads at a time, for the Python client and for other HTTP libraries.

aiohttp is measured if it is installed. All of them read one user per request, except for `AsyncProfiles, shared`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from tests.bench.comparison import Comparison
from tests.bench.environment import Environment
from tests.bench.servers import KEY, service, warm_up

PACKAGE = Path(__file__).parents[2] / "app" / "clients" / "python"
ROUNDS = 7
# Each client with its limit in seconds, and what it is compared with: see `tests.bench.client_reads`.
CLIENTS = {
    "Profiles": (110e-6, ["bare socket", "http.client"]),
    "AsyncProfiles": (160e-6, ["asyncio streams", "httpx", "aiohttp"]),
    "AsyncProfiles, shared": (160e-6, ["asyncio streams"]),
}


def measure(environment: Environment) -> Iterator[Comparison]:
    """Medians of alternating rounds."""
    others = {name for _, compared in CLIENTS.values() for name in compared}
    if find_spec("aiohttp") is None:
        others.discard("aiohttp")
    libraries = [*CLIENTS, *others]
    with service(environment.settings) as port:
        warm_up(port, environment.users)
        rounds = [{name: _cost(name, port) for name in libraries} for _ in range(ROUNDS)]
    costs = {name: median(found[name] for found in rounds) for name in libraries}
    for name, (limit_s, compared) in CLIENTS.items():
        yield Comparison(f"CPU of a read, {name}", "its limit", limit_s, costs[name], 1)
        for other in compared:
            if other in costs:
                yield Comparison(f"CPU of a read, {name}", other, costs[other], costs[name])


def _cost(library: str, port: int) -> float:
    """Seconds of CPU per read, in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.client_reads", library, str(port), KEY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path])}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
