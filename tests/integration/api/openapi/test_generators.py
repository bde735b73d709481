"""The OpenAPI document in the hands of strangers: linted, and turned into clients that compile and work."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.live import KEYS, Live, new_user
from tests.support.node import PINNED, node, with_packages
from tests.support.processes import ROOT
from tests.support.registry import FEATURES

pytestmark = pytest.mark.slow

RUN_S = 100
TSC = "typescript/bin/tsc"
# openapi-python-client leaves newline-delimited JSON out of the client. Arrays do the same.
UNSUPPORTED = "Unsupported content type application/x-ndjson"
PYTHON_CALL = """
import json
import sys

from generated import AuthenticatedClient
from generated.api.events import post_events
from generated.api.profiles import get_profile_detail, post_batch
from generated.api.tips import post_score
from generated.models import (
    BatchAnswer, BatchRequest, CandidateFeatures, DetailedProfileAnswer, EventsReceipt, FeatureName, IntDetail,
    ScoreAnswer, ScoreCandidate, ScoreRequest, TipServed,
)

url, key, event = sys.argv[1:]
client = AuthenticatedClient(base_url=url, token=key, prefix="", auth_header_name="X-API-Key")

batch = post_batch.sync(client=client, body=BatchRequest(user_ids=["ada"], features=[FeatureName.TIP_VOLUME_30D]))
assert isinstance(batch, BatchAnswer), batch
assert batch.profiles[0].features.tip_volume_30d == 0

candidate = ScoreCandidate(id="t-1", features=CandidateFeatures(is_overdue=True, task_age_days=3.5, priority=2))
score = post_score.sync(client=client, body=ScoreRequest(user_id="ada", candidates=[candidate]))
assert isinstance(score, ScoreAnswer), score
assert score.chosen_id == "t-1"

detailed = get_profile_detail.sync("ada", client=client)
assert isinstance(detailed, DetailedProfileAnswer), detailed
hour = detailed.features.preferred_hour
assert isinstance(hour, IntDetail)
assert hour.value is None

receipt = post_events.sync(client=client, body=[TipServed.from_dict(json.loads(event))])
assert isinstance(receipt, EventsReceipt), receipt
assert receipt.accepted == 1
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program of the virtual environment; its output. It must succeed."""
    programs = Path(sys.executable).parent
    path = os.pathsep.join((str(programs), os.environ["PATH"]))
    done = subprocess.run(
        [programs / command[0], *command[1:]],
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_S,
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `profiles openapi` makes, without a database or server."""
    directory = tmp_path_factory.mktemp("openapi")
    nowhere = {f"PROFILES_{name}_URL": "redis://127.0.0.1:1" for name in ("CACHE", "QUEUE")}
    path = directory / "openapi.json"
    command = ("python", "-m", "app", "openapi", "--registry", FEATURES)
    path.write_text(run(*command, cwd=ROOT, PROFILES_DATABASE=str(directory / "no.db"), **nowhere))
    assert [item.name for item in directory.iterdir()] == ["openapi.json"]
    return path


@pytest.fixture(scope="module")
def document(printed: Path) -> Any:
    return json.loads(printed.read_text())


async def test_document_is_printed_without_a_service(document: Any, keyed: Live) -> None:
    assert document == (await keyed.client.get("/schema/openapi.json")).json()


def test_linter_finds_nothing(printed: Path, document: Any, tmp_path: Path) -> None:
    shutil.copy(PINNED / "lint.cjs", with_packages(tmp_path))
    assert json.loads(node("lint.cjs", printed, cwd=tmp_path)) == []
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({name: part for name, part in document.items() if name != "security"}))
    found: list[dict[str, Any]] = json.loads(node("lint.cjs", broken, cwd=tmp_path))
    assert "security-defined" in {problem["ruleId"] for problem in found}


async def test_types_of_typescript_compile_and_work(printed: Path, tmp_path: Path, keyed: Live) -> None:
    shutil.copy(PINNED / "call.mts", with_packages(tmp_path))
    node("openapi-typescript/bin/cli.js", printed, "--output", "schema.d.ts", cwd=tmp_path)
    options = "--strict --exactOptionalPropertyTypes --noUncheckedIndexedAccess --module nodenext --target es2022"
    node(TSC, *options.split(), "call.mts", cwd=tmp_path)
    said = await asyncio.to_thread(node, "call.mjs", keyed.url, KEYS["admin"], new_user(), cwd=tmp_path)
    assert json.loads(said) == {"volume": 0, "chosen": "t-1", "hour": None, "origin": "computed", "nowhere": None}


async def test_client_of_python_compiles_and_works(printed: Path, document: Any, tmp_path: Path, keyed: Live) -> None:
    generated = ("--meta", "none", "--output-path", tmp_path / "generated")
    said = run("openapi-python-client", "generate", "--path", printed, *generated, cwd=tmp_path)
    assert (said.count("WARNING"), said.count("ERROR"), said.count(UNSUPPORTED)) == (1, 0, 1), said
    (tmp_path / "call.py").write_text(PYTHON_CALL)
    run("mypy", "--strict", "--follow-imports", "silent", "call.py", cwd=tmp_path)
    content = document["paths"]["/events"]["post"]["requestBody"]["content"]
    event = {**content["application/json"]["examples"]["served"]["value"], "user_id": new_user()}
    await asyncio.to_thread(run, "python", "call.py", keyed.url, KEYS["admin"], json.dumps(event), cwd=tmp_path)
