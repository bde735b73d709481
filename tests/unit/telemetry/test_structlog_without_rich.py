"""structlog without rich, which the command line still has."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import app.telemetry.logs, structlog.dev; print(structlog.dev.rich)", "None"),
        ("import app.telemetry.logs, rich; print(rich.__name__)", "rich"),
        ("import rich; import app.telemetry.logs, sys; print(sys.modules['rich'] is rich)", "True"),
    ],
    ids=["structlog has none", "imported after it", "imported before it"],
)
def test_rich_is_hidden_from_structlog_only(program: str, printed: str) -> None:
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == printed
