"""Runs one target under atheris: `python -m tests.fuzz.atheris_target TARGET [options and directories of libFuzzer]`.

atheris is no dependency, because it has wheels for few platforms. `make fuzz` installs it into .venv-fuzz.
"""

import importlib
import sys


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["app"]):
        targets = importlib.import_module("tests.fuzz.targets")
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
