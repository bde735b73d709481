"""`make bench-peers`: Feast's Python feature server with Redis beside ours, same data, one worker each, loaded by wrk.

Feast lives in an environment of its own (`.venv-peers`), made by the Makefile; nothing of it is a dependency.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from app.features.definitions import REGISTRY
from app.stores.valkey.embedded import EmbeddedServer, queue_options
from app.telemetry import configure_logging
from tests.bench.ground import Ground, ground, prepared
from tests.bench.load import post
from tests.bench.report import show
from tests.bench.serving import KEY, Target, alternately, batches, child, free_port, middle, seconds, service, singles
from tests.bench.timing import Comparison

BATCHES = ((1, None), (10, None), (100, 1 / 12))
CONNECTIONS = 8
ROUNDS = 5

_STORE = """
project: profiles
registry: registry.db
provider: local
online_store:
    type: redis
    connection_string: "127.0.0.1:{port}"
entity_key_serialization_version: 3
"""
_REPO = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, Int64

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
profile = FeatureView(
    name="profile",
    entities=[user],
    ttl=timedelta(hours=1),
    schema=[{fields}],
    online=True,
    source=FileSource(path="profiles.parquet", timestamp_field="computed_at"),
)
"""
_FILL = """
import json, sys
import pandas as pd
from feast import FeatureStore

rows = pd.DataFrame(json.load(open(sys.argv[1])))
rows["computed_at"] = pd.Timestamp.now(tz="UTC")
rows.to_parquet("profiles.parquet")
store = FeatureStore(".")
from repo import profile, user
store.apply([user, profile])
store.write_to_online_store("profile", rows)
"""
_TYPES = {"float": "Float64", "int": "Int64", "str": "String"}


def measure(ground: Ground, directory: Path, feast: Path) -> Iterator[Comparison]:
    """Throughput of single reads and of batches."""
    theirs, port = free_port(), free_port()
    options = (*queue_options(), "--port", str(port), "--bind", "127.0.0.1")
    online = EmbeddedServer(directory / "feast-redis", directory / "f.sock", options)
    online.start()
    try:
        with service(ground.settings) as ours:
            repo = _repo(directory, port, _profiles(ours, ground.users), feast)
            command = [str(feast / "feast"), "--chdir", str(repo), "serve", "-p", str(theirs), "-w", "1"]
            command += ["--max-requests", "1000000000", "--no-access-log", "--keep-alive-timeout", "600"]
            environment = {"FEAST_USAGE": "False", "PYTHONPATH": ""}
            with child(command, environment, theirs, "/health", timeout_s=60):
                yield from _compare(ours, theirs, ground.users)
    finally:
        online.stop()


def _compare(ours: int, theirs: int, users: list[str]) -> Iterator[Comparison]:
    asked = [_feast_request([user]) for user in users]
    yield _against_feast("single read, 32 connections", Target(theirs, asked), Target(ours, singles(users)), 32, 1 / 40)
    for size, floor in BATCHES:
        asked = [_feast_request(users[start : start + size]) for start in range(0, len(users), size)]
        name = f"batch of {size}, {CONNECTIONS} connections"
        yield _against_feast(name, Target(theirs, asked), Target(ours, batches(users, size)), CONNECTIONS, floor)


def _against_feast(name: str, theirs: Target, ours: Target, connections: int, at_most: float | None) -> Comparison:
    loads = alternately((theirs, ours), connections, rounds=ROUNDS, seconds=3)
    return Comparison(name, "Feast", middle(loads[0], seconds), middle(loads[1], seconds), at_most)


def _feast_request(users: list[str]) -> bytes:
    features = [f"profile:{name}" for name in REGISTRY.names]
    return post("/get-online-features", json.dumps({"features": features, "entities": {"user_id": users}}).encode())


def _profiles(port: int, users: list[str]) -> list[dict[str, object]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/profiles/batch",
        json.dumps({"user_ids": users}).encode(),
        {"Content-Type": "application/json", "X-API-Key": KEY},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [{"user_id": row["user_id"], **row["features"]} for row in json.load(answer)["profiles"]]


def _repo(directory: Path, port: int, profiles: list[dict[str, object]], feast: Path) -> Path:
    repo = directory / "repo"
    repo.mkdir()
    fields = ", ".join(f'Field(name="{entry.name}", dtype={_TYPES[entry.dtype]})' for entry in REGISTRY)
    (repo / "feature_store.yaml").write_text(_STORE.format(port=port))
    (repo / "repo.py").write_text(_REPO.format(fields=fields))
    (repo / "profiles.json").write_text(json.dumps(profiles))
    subprocess.run(
        [str(feast / "python"), "-W", "ignore", "-c", _FILL, "profiles.json"],
        cwd=repo,
        check=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
    )
    return repo


def main() -> None:
    """Measure and print. The argument: the directory of Feast's programs."""
    feast = Path(sys.argv[1]).resolve()
    configure_logging("console", "error")
    with prepared() as template, ground(template) as ours, tempfile.TemporaryDirectory(prefix="peers-") as name:
        show(list(measure(ours, Path(name), feast)))


if __name__ == "__main__":
    main()
