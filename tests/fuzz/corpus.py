"""The inputs that coverage-guided fuzzing has found, kept as text: one JSON list for each target, a string an input.

Each character is a byte (latin-1). `tests/fuzz/test_targets.py` runs them all without any fuzzer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

DIRECTORY = Path(__file__).with_name("corpus")
MOST_INPUTS = 150
MOST_BYTES = 2_000


def stored(target: str) -> list[bytes]:
    """The inputs kept for a target."""
    texts: list[str] = json.loads((DIRECTORY / f"{target}.json").read_text())
    return [text.encode("latin-1") for text in texts]


def store(target: str, inputs: Iterable[bytes]) -> None:
    """Keep the shortest of these, and what is kept already."""
    old = stored(target) if (DIRECTORY / f"{target}.json").exists() else []
    new = sorted({item for item in inputs if len(item) <= MOST_BYTES} - set(old), key=lambda item: (len(item), item))
    kept = [*old, *new[: max(0, MOST_INPUTS - len(old))]]
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / f"{target}.json").write_text(json.dumps([item.decode("latin-1") for item in kept], indent=0) + "\n")


def unpack(target: str, directory: Path) -> None:
    """As files, which is how a fuzzer wants them."""
    directory.mkdir(parents=True, exist_ok=True)
    for item in stored(target):
        (directory / hashlib.sha256(item).hexdigest()[:16]).write_bytes(item)
