"""Drives one target with atheris: `python -m tests.fuzz.guided TARGET [libFuzzer's options and directories]`.

atheris is no dependency: its wheels are for few platforms, and `make fuzz` installs it beside, into .venv-fuzz.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["app"]):
        targets = importlib.import_module("tests.fuzz.targets")
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
