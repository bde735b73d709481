"""`make bench-peers`: Feast's Python feature server with Redis, and ours, with the same data and one worker each.

Feast is measured twice: with all features in one feature view, which is fastest but gives them one TTL and source; and
with a view for each TTL and source, as our registry declares them.

The Makefile installs Feast into an environment of its own (`.venv-peers`). It is no dependency.
"""

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from app.features.registry import Feature
from app.stores.valkey.embedded import QUEUE_OPTIONS, EmbeddedServer
from app.telemetry import configure_logging
from tests.bench.comparison import Comparison, show
from tests.bench.environment import Environment, demonstration_set, environment
from tests.bench.load import Target, alternately, cost, middle, post
from tests.bench.servers import KEY, batches, service, serving, singles, warm_up, without_local_cache
from tests.support.processes import free_port
from tests.support.registry import REGISTRY

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
from feast.types import Float64, Int64, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
source = FileSource(path="profiles.parquet", timestamp_field="computed_at")
views = [
    FeatureView(
        name=name,
        entities=[user],
        ttl=timedelta(seconds=ttl_s),
        schema=[Field(name=feature, dtype=dtype) for feature, dtype in fields],
        online=True,
        source=source,
    )
    for name, ttl_s, fields in {views}
]
"""
_FILL = """
import json, sys
import pandas as pd
from feast import FeatureStore

rows = pd.DataFrame(json.load(open(sys.argv[1])))
rows["computed_at"] = pd.Timestamp.now(tz="UTC")
rows.to_parquet("profiles.parquet")
store = FeatureStore(".")
from repo import user, views
store.apply([user, *views])
for view in views:
    store.write_to_online_store(view.name, rows[["user_id", "computed_at", *(field.name for field in view.features)]])
"""
_TYPES = {"float": "Float64", "int": "Int64", "str": "String"}


class View(NamedTuple):
    """A feature view of Feast, which has one TTL and one source."""

    name: str
    ttl_s: int
    features: tuple[Feature, ...]


def _one_view() -> list[View]:
    return [View("profile", 3_600, tuple(REGISTRY))]


def _view_for_each() -> list[View]:
    found: dict[tuple[int, tuple[str, ...]], list[Feature]] = {}
    for entry in REGISTRY:
        found.setdefault((entry.ttl_ms // 1_000, entry.invalidated_by), []).append(entry)
    return [View(f"view_{number}", ttl_s, tuple(entries)) for number, ((ttl_s, _), entries) in enumerate(found.items())]


def measure(environment: Environment, directory: Path, feast: Path) -> Iterator[Comparison]:
    """Throughput of single reads and of batches. `feast` is the directory of Feast's programs."""
    port = free_port()
    options = (*QUEUE_OPTIONS, "--port", str(port), "--bind", "127.0.0.1")
    online = EmbeddedServer(directory / "feast-redis", directory / "f.sock", options)
    online.start()
    try:
        with service(environment.settings) as near, service(without_local_cache(environment.settings)) as far:
            profiles = _profiles(near, environment.users)
            warm_up(near, environment.users)
            views = _one_view()
            with _feast(directory / "one", port, views, profiles, feast) as theirs:
                yield from _compare("Feast", {"": near, " from the server": far}, theirs, views, environment.users)
            views = _view_for_each()
            with _feast(directory / "each", port, views, profiles, feast) as theirs:
                yield from _compare(f"Feast, {len(views)} views", {"": near}, theirs, views, environment.users)
    finally:
        online.stop()


def _compare(
    against: str, ours: Mapping[str, int], theirs: int, views: Sequence[View], users: list[str]
) -> Iterator[Comparison]:
    for size, connections, limit in (1, 32, 1 / 40), (100, 8, 1 / 12):
        groups = [users[start : start + size] for start in range(0, len(users), size)]
        asked = singles(users) if size == 1 else batches(users, size)
        targets = [Target(theirs, [_feast_request(group, views) for group in groups])]
        targets += [Target(port, asked) for port in ours.values()]
        feast, *loads = alternately(targets, connections, rounds=ROUNDS, seconds=3)
        for how, load in zip(ours, loads, strict=True):
            what = "single read" if size == 1 else f"batch of {size}"
            name = f"{what}{how}, {connections} connections"
            yield Comparison(name, against, middle(feast, cost), middle(load, cost), limit)


def _feast_request(users: list[str], views: Sequence[View]) -> bytes:
    features = [f"{view.name}:{entry.name}" for view in views for entry in view.features]
    return post("/get-online-features", json.dumps({"features": features, "entities": {"user_id": users}}).encode())


@contextmanager
def _feast(
    repo: Path, redis_port: int, views: Sequence[View], profiles: list[dict[str, object]], feast: Path
) -> Iterator[int]:
    """Feast's server with these views, filled; yields its port."""
    _fill(repo, redis_port, views, profiles, feast)
    port = free_port()
    command = [str(feast / "feast"), "--chdir", str(repo), "serve", "-p", str(port), "-w", "1"]
    command += ["--max-requests", "1000000000", "--no-access-log", "--keep-alive-timeout", "600"]
    with serving(command, {"FEAST_USAGE": "False", "PYTHONPATH": ""}, port, "/health", timeout_s=60):
        yield port


def _profiles(port: int, users: list[str]) -> list[dict[str, object]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/profiles/batch",
        json.dumps({"user_ids": users}).encode(),
        {"Content-Type": "application/json", "X-API-Key": KEY},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [{"user_id": row["user_id"], **row["features"]} for row in json.load(answer)["profiles"]]


def _fill(repo: Path, port: int, views: Sequence[View], profiles: list[dict[str, object]], feast: Path) -> None:
    repo.mkdir()
    written = ", ".join(
        f"({view.name!r}, {view.ttl_s}, [{', '.join(f'({e.name!r}, {_TYPES[e.dtype]})' for e in view.features)}])"
        for view in views
    )
    (repo / "feature_store.yaml").write_text(_STORE.format(port=port))
    (repo / "repo.py").write_text(_REPO.replace("{views}", f"[{written}]"))
    (repo / "profiles.json").write_text(json.dumps(profiles))
    subprocess.run(
        [str(feast / "python"), "-W", "ignore", "-c", _FILL, "profiles.json"],
        cwd=repo,
        check=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
    )


def main() -> None:
    feast = Path(sys.argv[1]).resolve()
    configure_logging("console", "error")
    with (
        demonstration_set() as template,
        environment(template) as ours,
        tempfile.TemporaryDirectory(prefix="peers-") as name,
    ):
        show(list(measure(ours, Path(name), feast)))


if __name__ == "__main__":
    main()
