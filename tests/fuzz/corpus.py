"""Input that coverage-guided fuzzing has found: for each target a JSON list of strings, one character a byte (latin-1).

`tests/fuzz/test_targets.py` runs all of it without a fuzzer.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

DIRECTORY = Path(__file__).with_name("corpus")
MAX_INPUTS = 150
MAX_BYTES = 2_000


def stored(target: str) -> list[bytes]:
    texts: list[str] = json.loads((DIRECTORY / f"{target}.json").read_text())
    return [text.encode("latin-1") for text in texts]


def store(target: str, inputs: Iterable[bytes]) -> None:
    """Add the shortest of these inputs to the stored ones."""
    old = stored(target) if (DIRECTORY / f"{target}.json").exists() else []
    new = sorted({item for item in inputs if len(item) <= MAX_BYTES} - set(old), key=lambda item: (len(item), item))
    kept = [*old, *new[: max(0, MAX_INPUTS - len(old))]]
    DIRECTORY.mkdir(exist_ok=True)
    (DIRECTORY / f"{target}.json").write_text(json.dumps([item.decode("latin-1") for item in kept], indent=0) + "\n")


def unpack(target: str, directory: Path) -> None:
    """Write each input to a file, as a fuzzer expects."""
    directory.mkdir(parents=True, exist_ok=True)
    for item in stored(target):
        (directory / hashlib.sha256(item).hexdigest()[:16]).write_bytes(item)
