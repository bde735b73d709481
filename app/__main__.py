"""The command line: `profiles …`, or `python -m app …`."""

from __future__ import annotations

import gc


def main() -> None:
    # While modules are imported, Python's cycle collector would run 20 times and find little.
    gc.disable()
    from app.cli import main as command  # noqa: PLC0415

    gc.enable()
    command()


if __name__ == "__main__":
    main()
