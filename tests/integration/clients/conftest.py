"""The service as `profiles up` runs it: an API process, a worker, a cache and a queue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes import Programs, free_port


@pytest.fixture(scope="package")
def service_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With an empty database and no keys. Tests share it, so each uses users of its own."""
    programs = Programs(tmp_path_factory.mktemp("up"))
    port = free_port()
    try:
        programs.start("up", port=port, worker_metrics_port=0, demo=0).says("Up.")
        yield f"http://127.0.0.1:{port}"
    finally:
        programs.close()
