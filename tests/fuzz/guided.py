"""Coverage-guided fuzzing: runs a target under atheris, in a process of its own and for a limited time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.corpus import store, unpack
from tests.support.processes import ROOT

GRACE_S = 60
LONGEST_INPUT = 4_096


class Result(NamedTuple):
    """The number of inputs, and the output of the fuzzer if one of them broke the target."""

    inputs: int
    finding: str | None


def fuzz(target: str, atheris: Path, seconds: int, seed: int, *, keep: bool = False) -> Result:
    """With `keep`, input that reached new code is added to the corpus."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        corpus = Path(directory) / "corpus"
        unpack(target, corpus)
        limits = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={LONGEST_INPUT}", "-print_final_stats=1"]
        done = _run(target, atheris, [*limits, f"-artifact_prefix={directory}/", str(corpus)], seconds)
        output = done.stdout + done.stderr
        found = re.search(r"stat::number_of_executed_units: (\d+)", output)
        inputs = int(found[1]) if found else 0
        if done.returncode == 0 and keep:
            store(target, (path.read_bytes() for path in corpus.iterdir()))
    return Result(inputs, None if done.returncode == 0 and inputs else output[-4_000:])


def _run(target: str, atheris: Path, arguments: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{atheris}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.fuzz.atheris_target", target, *arguments]
    return subprocess.run(
        command,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds + GRACE_S,
    )
