"""The code blocks of every README, and running the blocks of a section from top to bottom.

`sh` blocks run in bash, and a `json` block after one shows an answer of it. A block whose first line is `# NAME.py` or
`// NAME.ts` is written to that file; any other `python` block is run. The commands need `profiles` and `python` on the
PATH, which `Reader` provides. An `nginx` block configures the one of `tests/browser/test_behind_proxy.py`.
"""

import json
import os
import re
import stat
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.processes import ROOT, free_port
from tests.support.waiting import eventually_sync

CLIENT = ROOT / "app" / "clients" / "python"
READMES = sorted(
    path
    for pattern in ("README*.md", "app/**/README*.md", "tests/**/README*.md", "docker/**/README*.md")
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^( *)```(.*)\n((?:.*\n)*?) *```$", re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LANGUAGES = {"sh", "python", "json", "nginx", "sql", "ts"}
BY_CI = re.compile(r"(make|docker) ")  # CI runs these targets; docker/check.sh builds and starts the image
FILE = re.compile(r"(?:#|//) ([\w/]+\.(?:py|ts))\n")
UP = "profiles up"
STOP_S = 30


class Block(NamedTuple):
    """A code block. `section` is the heading above it."""

    path: Path
    section: str
    line: int
    language: str
    code: str

    @property
    def by_ci(self) -> bool:
        """Whether CI runs this block instead of the tests."""
        return self.language == "sh" and BY_CI.match(self.code) is not None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text()
    found = list(FENCED.finditer(text))
    inside = [(block.start(), block.end()) for block in found]
    headings = [item for item in HEADING.finditer(text) if not any(start < item.start() < end for start, end in inside)]
    return [
        Block(
            path,
            [item[1] for item in headings if item.start() < block.start()][-1],
            text.count("\n", 0, block.start()) + 1,
            block[2].strip(),
            textwrap.dedent(block[3]),
        )
        for block in found
    ]


def sections() -> dict[str, list[Block]]:
    """The blocks that the tests run, by file and section."""
    found = [block for path in READMES for block in blocks_of(path) if not block.by_ci]
    return {
        f"{path.relative_to(ROOT)}: {section}": list(blocks)
        for (path, section), blocks in groupby(found, key=lambda block: (block.path, block.section))
    }


class Reader:
    """A reader of the README, who runs its commands in a directory outside the repository."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        binaries = directory / "bin"
        binaries.mkdir()
        for name, arguments in (("profiles", "-m app "), ("python", "")):
            shim = binaries / name
            shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
            shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PROFILES_")}
        self.environment = {
            **inherited,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(CLIENT)]),
            "PROFILES_PORT": str(self.port),
            "PROFILES_WORKER_METRICS_PORT": "0",
        }

    @contextmanager
    def up(self, before: str = "") -> Iterator[None]:
        """Run the script `before` and `profiles up` in one shell. The block begins when the service is ready."""
        log = self.directory / "up.log"
        with log.open("wb") as output:
            # `exec`, so that the signal reaches `profiles up` and not the shell.
            command = self._bash(f"{before}exec {UP}")
            child = subprocess.Popen(
                command, env=self.environment, cwd=self.directory, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            eventually_sync(lambda: child.poll() is not None or self._ready())
            assert child.poll() is None, log.read_text()
            yield
        finally:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
            child.kill()
            child.wait()

    def _ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=1) as answer:
            return bool(json.load(answer)["status"] == "ready")
        return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def follow(self, blocks: Iterable[Block]) -> str:
        """Run the blocks in their order; their output. `profiles up` must be running."""
        printed = ""
        for block in blocks:
            if block.language == "json":
                check_answer(block, printed)
            elif name := FILE.match(block.code):
                (self.directory / name[1]).write_text(self.adapted(block.code))
            elif block.language == "python":
                printed += self._run([sys.executable, "-W", "error", "-c", self.adapted(block.code)])
            else:
                printed += self._run(self._bash(self.adapted(block.code)))
        return printed

    def adapted(self, script: str) -> str:
        """Replace the port by ours, and let curl fail if the answer is an error."""
        script = script.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        return re.sub(r"\bcurl -s\b", r"curl -sS --fail-with-body -w '\\n'", script)

    @staticmethod
    def _bash(script: str) -> list[str]:
        return ["bash", "-euo", "pipefail", "-c", script]

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{command[-1]}\n{textwrap.shorten(done.stdout, 3000)}"
        return done.stdout


def check_answer(block: Block, printed: str) -> None:
    """Check that the block shows a printed answer; the values may differ."""
    answers = []
    for line in printed.splitlines():
        with suppress(ValueError):
            answers.append(json.loads(line))
    shown = shape(json.loads(block.code))
    assert shown in [shape(answer) for answer in answers], f"line {block.line}: no printed answer has these keys"


def shape(value: object) -> object:
    """The keys of a JSON value, without the scalar values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else None
